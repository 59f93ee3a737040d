"""Which warm worker takes which waiting request: earliest deadline first."""

from __future__ import annotations

from msgspec import Struct

from broker.policy.estimate import remaining_s, step_s
from broker.state.events import Now
from broker.state.model import Learned, Request, State

NEARLY_FREE = 1.5  # a shared step may take this much longer than a lone one and still be worth sharing unasked
LOOK_AHEAD = 64  # waiting requests that are looked past for one that a worker may take


class Seat(Struct):
    """A warm worker during one round of placement."""

    allocation_id: int
    slots: int
    running: list[Request]

    @property
    def free(self) -> bool:
        return len(self.running) < self.slots


def place(state: State, pool: str, queue: list[Request], now: Now) -> tuple[list[tuple[int, int]], list[Request]]:
    """Seats requests of `queue` (sorted by deadline) on the pool's warm workers.

    Returns [(request id, allocation id)] and those that go on waiting, in order. Never more than `slots` on a worker.
    A later deadline goes ahead only where the earlier one would itself be late if it joined, or make others late.
    """
    seats = [
        Seat(a.id, state.site.pools[pool].slots, [state.requests[i] for i in a.running])
        for a in state.allocations_of(pool)
        if a.serving
    ]
    learned = state.known(pool)
    placed: list[tuple[int, int]] = []
    waiting: list[Request] = []
    for position, request in enumerate(queue):
        free = [s for s in seats if s.free]
        if not free or len(waiting) == LOOK_AHEAD:
            return placed, waiting + queue[position:]
        seat = _choose(free, request, learned, now)
        if seat is None:
            waiting.append(request)
            continue
        seat.running.append(request)
        placed.append((request.id, seat.allocation_id))
    return placed, waiting


def _choose(seats: list[Seat], request: Request, learned: Learned, now: Now) -> Seat | None:
    """The fullest worker that the request may join at no harm while that is nearly free, so that others empty out and
    can be given back; else the emptiest. None when joining would break deadlines and waiting is better."""
    harmless = [s for s in seats if not s.running or _harmless(s, request, learned, now)]
    cheap = [s for s in harmless if step_s(learned, len(s.running) + 1) <= NEARLY_FREE * step_s(learned, 1)]
    if cheap:
        return max(cheap, key=lambda s: (len(s.running), -s.allocation_id))
    if harmless:
        return min(harmless, key=lambda s: (len(s.running), s.allocation_id))
    if seats and _late(request, learned, 1, now):
        return min(seats, key=lambda s: (len(s.running), s.allocation_id))
    return None


def _harmless(seat: Seat, request: Request, learned: Learned, now: Now) -> bool:
    """Nobody there becomes late by it, and the request itself is in time there if it would be so alone."""
    packed = len(seat.running) + 1
    if _late(request, learned, packed, now) and not _late(request, learned, 1, now):
        return False
    return not any(_late(r, learned, packed, now) and not _late(r, learned, packed - 1, now) for r in seat.running)


def _late(request: Request, learned: Learned, packed: int, now: Now) -> bool:
    return now.unix_s + remaining_s(request, learned, packed) > request.deadline_unix_s

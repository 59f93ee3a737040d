"""When to order another allocation and when to give one back."""

from __future__ import annotations

import heapq

from msgspec import Struct

from broker.policy.estimate import cold_start_s, load_s, remaining_s
from broker.protocol.states import AllocationState
from broker.state.events import Now
from broker.state.model import Allocation, Learned, Request, State


class Forecast(Struct, frozen=True, kw_only=True):
    """When each waiting request would finish on the workers that are there or on their way."""

    finish_unix_s: dict[int, float]
    serving: int
    coming: int


def forecast(
    state: State, pool: str, queue: list[Request], placed: list[tuple[int, int]], now: Now, *, extra: int = 0
) -> Forecast:
    """List-schedules `queue` (sorted by deadline), one request at a time on each worker, with `extra` allocations
    ordered now besides. Allocations on their way count from the moment they are expected, and only here: never in
    placement.
    """
    learned = state.known(pool)
    joining: dict[int, list[int]] = {}
    for request_id, allocation_id in placed:
        joining.setdefault(allocation_id, []).append(request_id)
    free_at: list[float] = []
    serving = coming = 0
    for allocation in state.allocations_of(pool):
        if allocation.serving:
            serving += 1
            seated = [state.requests[i] for i in (*allocation.running, *joining.get(allocation.id, ()))]
            free_at.append(now.unix_s + sum(remaining_s(r, learned, 1) for r in seated))
        elif allocation.coming:
            coming += 1
            free_at.append(_expected_unix_s(allocation, learned, now))
    free_at += [now.unix_s + cold_start_s(learned)] * extra
    # Without any worker, the times say what one ordered now would give.
    lanes = free_at or [now.unix_s + cold_start_s(learned)]
    heapq.heapify(lanes)
    finish: dict[int, float] = {}
    for request in queue:
        finish[request.id] = lanes[0] + remaining_s(request, learned, 1)
        heapq.heapreplace(lanes, finish[request.id])
    return Forecast(finish_unix_s=finish, serving=serving, coming=coming)


def _expected_unix_s(allocation: Allocation, learned: Learned, now: Now) -> float:
    """When a worker that is on its way will serve; one that is overdue is expected after as long again."""
    if allocation.state is AllocationState.WARM:
        return now.unix_s
    if allocation.state is AllocationState.LOADING:
        since, needed_s = allocation.started_unix_s, load_s(learned)
    else:
        since, needed_s = allocation.ordered_unix_s, cold_start_s(learned)
    spent_s = max(0.0, now.unix_s - since)
    return now.unix_s + (needed_s - spent_s if spent_s < needed_s else spent_s)


def wanted(state: State, pool: str, queue: list[Request], placed: list[tuple[int, int]], now: Now) -> list[str]:
    """One reason for each allocation to order now that `placed` are seated. Never beyond the cap, pending and draining
    ones counted; never while the pool is paused; for a deadline only if the new worker would save it."""
    config = state.site.pools[pool]
    health = state.health.get(pool)
    if health and health.paused_until_unix_s > now.unix_s:
        return []
    existing = state.allocations_of(pool)
    alive = sum(1 for a in existing if a.state is not AllocationState.DRAINING)
    reasons = ["floor"] * max(0, config.min_workers - alive)
    if queue and not alive and not reasons:
        reasons.append("first request")
    room = config.max_workers - len(existing)
    if len(reasons) >= room:
        return reasons[: max(0, room)]
    missed = _missed(queue, forecast(state, pool, queue, placed, now, extra=len(reasons)))
    while missed and len(reasons) < room:
        still = _missed(queue, forecast(state, pool, queue, placed, now, extra=len(reasons) + 1))
        if len(still) >= len(missed):
            break
        reasons.append(f"the deadline of request {missed[0]}")
        missed = still
    return reasons


def _missed(queue: list[Request], ahead: Forecast) -> list[int]:
    return [r.id for r in queue if ahead.finish_unix_s[r.id] > r.deadline_unix_s]


def surplus(state: State, pool: str, now: Now) -> list[tuple[int, str]]:
    """Allocations of a pool without waiting requests to give back: not yet serving ones beyond the floor at once, idle
    ones after the window."""
    config = state.site.pools[pool]
    alive = [a for a in state.allocations_of(pool) if a.state is not AllocationState.DRAINING]
    spare = len(alive) - config.min_workers
    drains: list[tuple[int, str]] = []
    for allocation in sorted(alive, key=lambda a: (a.ever_ready, -a.id)):
        if len(drains) >= spare:
            break
        if allocation.running:
            continue
        if allocation.state in (AllocationState.ORDERED, AllocationState.PENDING):
            drains.append((allocation.id, "no longer needed"))
        elif (
            allocation.state is AllocationState.WARM and now.mono_s - allocation.idle_since_mono_s >= config.idle_window
        ):
            drains.append((allocation.id, "idle"))
    return drains

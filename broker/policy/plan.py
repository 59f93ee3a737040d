"""The policy's face: one immutable plan from one look at the whole state.

This policy is earliest deadline first: warm workers take the request whose deadline comes first; requests share a
worker while that is nearly free or breaks no deadline; one more allocation is ordered when a deadline would else be
missed and the new worker would be there in time; idle allocations beyond the floor are given back after a window.
"""

from __future__ import annotations

from msgspec import Struct

from broker.policy.placement import place
from broker.policy.scaling import Forecast, forecast, surplus, wanted
from broker.protocol.states import OnMiss, Reason, RequestState
from broker.state.events import Now
from broker.state.model import Request, State


class Plan(Struct, frozen=True, kw_only=True):
    """What to do now, and what to tell those who wait."""

    placements: list[tuple[int, int]]  # (request id, allocation id), in order
    orders: list[tuple[str, str]]  # (pool, reason): one allocation each
    drains: list[tuple[int, str]]  # (allocation id, reason)
    drops: list[int]  # requests whose deadline has passed and who wanted no more of it then
    reasons: dict[int, Reason]  # why each waiting request waits
    finish_unix_s: dict[int, float]  # predicted, of each waiting request
    outlook: dict[str, list[tuple[float, float]]]  # pool -> [(deadline, finish)] of the waiting, by deadline


def plan(state: State, now: Now) -> Plan:
    """Decides for every pool. Depends on (state, now) alone and changes nothing."""
    result = Plan(placements=[], orders=[], drains=[], drops=[], reasons={}, finish_unix_s={}, outlook={})
    waiting: dict[str, list[Request]] = {}
    for request in state.requests.values():
        if request.spec.on_miss is OnMiss.DROP and now.unix_s > request.deadline_unix_s:
            result.drops.append(request.id)
        elif request.state is RequestState.PENDING:
            waiting.setdefault(request.pool, []).append(request)
    for pool in state.site.pools:
        queue = sorted(waiting.get(pool, ()), key=lambda r: (r.deadline_unix_s, r.id))
        _plan_pool(state, pool, queue, now, result)
    return result


def _plan_pool(state: State, pool: str, queue: list[Request], now: Now, result: Plan) -> None:
    placed, left = place(state, pool, queue, now)
    result.placements.extend(placed)
    ahead = forecast(state, pool, left, placed, now)
    order_reasons = wanted(state, pool, left, placed, now)
    result.orders.extend((pool, reason) for reason in order_reasons)
    if not queue:
        result.drains.extend(surplus(state, pool, now))
    result.finish_unix_s.update(ahead.finish_unix_s)
    result.outlook[pool] = [(r.deadline_unix_s, ahead.finish_unix_s[r.id]) for r in left]
    reason = _why(state, pool, bool(order_reasons), ahead, now)
    result.reasons.update((r.id, Reason.WORKER_LOST if r.reason is Reason.WORKER_LOST else reason) for r in left)


def _why(state: State, pool: str, ordering: bool, ahead: Forecast, now: Now) -> Reason:
    health = state.health.get(pool)
    if health and health.paused_until_unix_s > now.unix_s and not ahead.serving:
        return Reason.POOL_DOWN
    if ordering or ahead.coming:
        return Reason.COLD_START
    alive = len(state.allocations_of(pool))
    return Reason.RESOURCES if alive >= state.site.pools[pool].max_workers else Reason.PRIORITY

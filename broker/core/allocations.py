"""Transitions of allocations and of the workers in them."""

from __future__ import annotations

from broker.allocations import JobState
from broker.core.commands import AnyCommand, CancelJob, ForgetAllocation, Greet, SendAssign, SendDrain, SubmitAllocation
from broker.core.requests import requeue
from broker.policy.estimate import blend
from broker.protocol.states import AllocationState
from broker.state.events import (
    AllocationDrained,
    AllocationObserved,
    AllocationOrdered,
    AllocationRefused,
    AllocationSubmitted,
    Now,
    WorkerHeard,
    WorkerLeaving,
    WorkerLost,
    WorkerReady,
    WorkerRegistered,
)
from broker.state.model import Allocation, State

PAUSE_MAX_S = 300.0


def ordered(state: State, event: AllocationOrdered, now: Now) -> list[AnyCommand]:
    allocation = Allocation(id=event.allocation_id, name=event.name, pool=event.pool, ordered_unix_s=now.unix_s)
    allocation.reason, allocation.heard_mono_s = event.reason, now.mono_s
    state.allocations[allocation.id] = allocation
    state.counters.allocation_id = max(state.counters.allocation_id, allocation.id)
    state.touch(allocation)
    return [SubmitAllocation(allocation.id)]


def submitted(state: State, event: AllocationSubmitted, now: Now) -> list[AnyCommand]:
    allocation = state.allocations.get(event.allocation_id)
    if allocation is None:
        return [CancelJob(event.job_id, event.allocation_id)]
    allocation.job_id = event.job_id
    state.touch(allocation)
    if allocation.state is AllocationState.DRAINING:
        return [CancelJob(event.job_id, allocation.id)]
    if allocation.state is AllocationState.ORDERED:
        allocation.state = AllocationState.PENDING
    return []


def refused(state: State, event: AllocationRefused, now: Now) -> list[AnyCommand]:
    allocation = state.allocations.get(event.allocation_id)
    if allocation is not None:
        _failed(state, allocation.pool, event.error, now)
        return _end(state, allocation, event.error, now)
    return []


def observed(state: State, event: AllocationObserved, now: Now) -> list[AnyCommand]:
    allocation = state.allocations.get(event.allocation_id)
    if allocation is None:
        return []
    allocation.job_id = event.job_id or allocation.job_id
    allocation.node = event.node or allocation.node
    allocation.end_unix_s = event.end_unix_s or allocation.end_unix_s
    state.touch(allocation)
    if event.state is JobState.ENDED:
        if not allocation.ever_ready and allocation.state is not AllocationState.DRAINING:
            _failed(state, allocation.pool, event.reason, now)
        return _end(state, allocation, event.reason, now)
    if event.state is JobState.RUNNING and allocation.state in (AllocationState.ORDERED, AllocationState.PENDING):
        _started(state, allocation, event.start_unix_s or now.unix_s)
    elif event.state is JobState.PENDING and allocation.state is AllocationState.ORDERED:
        allocation.state = AllocationState.PENDING
    return []


def drained(state: State, event: AllocationDrained, now: Now) -> list[AnyCommand]:
    allocation = state.allocations[event.allocation_id]
    was = allocation.state
    _drain(state, allocation, event.reason, now)
    if was in (AllocationState.LOADING, AllocationState.WARM) and allocation.connected:
        return [SendDrain(allocation.id, event.reason)]
    return _cancel(allocation)


def registered(state: State, event: WorkerRegistered, now: Now) -> list[AnyCommand]:
    """The same process keeps its epoch and its requests; another one is another holder of the slot."""
    allocation = state.allocations[event.allocation_id]
    if allocation.incarnation != event.incarnation:
        _requeue_all(state, allocation, now)
        allocation.epoch = event.epoch
        state.counters.epoch = max(state.counters.epoch, event.epoch)
        if allocation.state is not AllocationState.DRAINING:
            _started(state, allocation, allocation.started_unix_s or now.unix_s)
    allocation.incarnation, allocation.restart_count = event.incarnation, event.restart_count
    allocation.job_id = allocation.job_id or event.job_id  # the provider's word for it is the one that cancels it
    allocation.node, allocation.gpus = event.host, event.gpus
    allocation.end_unix_s = event.end_unix_s or allocation.end_unix_s
    allocation.connected, allocation.heard_mono_s = True, now.mono_s
    state.touch(allocation)
    theirs = {r.request_id: r.attempt for r in event.running}
    drop = tuple((i, a) for i, a in theirs.items() if allocation.running.get(i) != a)
    commands: list[AnyCommand] = [Greet(allocation.id, drop)]
    commands += [SendAssign(allocation.id, i, a) for i, a in allocation.running.items() if theirs.get(i) != a]
    if allocation.state is AllocationState.DRAINING:
        commands.append(SendDrain(allocation.id, allocation.reason))
    return commands


def ready(state: State, event: WorkerReady, now: Now) -> list[AnyCommand]:
    allocation = _holder(state, event.allocation_id, event.epoch)
    if allocation is None or allocation.state is AllocationState.DRAINING:
        return []
    learned = state.knowledge(allocation.pool)
    if not allocation.ever_ready:
        learned.load_s = blend(learned.load_s, max(0.0, now.unix_s - allocation.started_unix_s))
        queue_s = max(0.0, allocation.started_unix_s - allocation.ordered_unix_s)
        learned.queue_s = blend(learned.queue_s, queue_s)
        allocation.phases_s = {"queue": queue_s, **event.phases_s}
        allocation.ready_unix_s, allocation.ever_ready = now.unix_s, True
    if allocation.state is not AllocationState.WARM:
        allocation.idle_since_mono_s, allocation.idle_since_unix_s = now.mono_s, now.unix_s
    learned.profile = allocation.profile = event.profile
    allocation.state, allocation.reason = AllocationState.WARM, ""
    state.health.pop(allocation.pool, None)
    state.touch(allocation)
    return []


def leaving(state: State, event: WorkerLeaving, now: Now) -> list[AnyCommand]:
    allocation = _holder(state, event.allocation_id, event.epoch)
    if allocation is None:
        return []
    for back in event.given_back:
        if allocation.running.get(back.request_id) == back.attempt:
            requeue(state, state.requests[back.request_id], now)
    if event.restarting and allocation.state is not AllocationState.DRAINING:
        allocation.state, allocation.reason = AllocationState.LOADING, event.reason
        state.touch(allocation)
        return []
    if event.final:
        _requeue_all(state, allocation, now)
        allocation.connected = False
        if not allocation.ever_ready and allocation.state is not AllocationState.DRAINING:
            _failed(state, allocation.pool, event.reason, now)
    _drain(state, allocation, event.reason, now)
    return []


def heard(state: State, event: WorkerHeard, now: Now) -> list[AnyCommand]:
    allocation = state.allocations.get(event.allocation_id)
    if allocation is not None:
        allocation.heard_mono_s = now.mono_s
        allocation.rss_mb = event.rss_mb or allocation.rss_mb
    return []


def lost(state: State, event: WorkerLost, now: Now) -> list[AnyCommand]:
    allocation = state.allocations[event.allocation_id]
    _requeue_all(state, allocation, now)
    _drain(state, allocation, event.reason, now)
    allocation.epoch, allocation.connected = 0, False
    allocation.draining_since_mono_s = now.mono_s
    return _cancel(allocation)


def _holder(state: State, allocation_id: int, epoch: int) -> Allocation | None:
    allocation = state.allocations.get(allocation_id)
    return allocation if allocation is not None and allocation.epoch == epoch else None


def _started(state: State, allocation: Allocation, started_unix_s: float) -> None:
    allocation.state, allocation.started_unix_s = AllocationState.LOADING, started_unix_s
    state.touch(allocation)


def _drain(state: State, allocation: Allocation, reason: str, now: Now) -> None:
    if allocation.state is not AllocationState.DRAINING:
        allocation.state, allocation.reason = AllocationState.DRAINING, reason
        allocation.draining_since_mono_s = now.mono_s
    state.touch(allocation)


def _requeue_all(state: State, allocation: Allocation, now: Now) -> None:
    for request_id in list(allocation.running):
        requeue(state, state.requests[request_id], now)


def _cancel(allocation: Allocation) -> list[AnyCommand]:
    return [CancelJob(allocation.job_id, allocation.id)] if allocation.job_id else []


def _end(state: State, allocation: Allocation, reason: str, now: Now) -> list[AnyCommand]:
    _requeue_all(state, allocation, now)
    allocation.state, allocation.connected = AllocationState.ENDED, False
    allocation.reason = allocation.reason or reason
    allocation.end_unix_s = now.unix_s
    del state.allocations[allocation.id]
    state.touch(allocation)
    return [ForgetAllocation(allocation.id, allocation.name)]


def _failed(state: State, pool: str, reason: str, now: Now) -> None:
    """An allocation that never served: the pool pauses, twice as long after each one in a row, then tries again."""
    health = state.pool_health(pool)
    health.failures += 1
    health.paused_until_unix_s = now.unix_s + min(PAUSE_MAX_S, 2.0 ** min(health.failures, 16))
    health.reason = reason

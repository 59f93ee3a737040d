"""Transitions of requests."""

from __future__ import annotations

from broker.core.commands import AnyCommand, ForgetCheckpoint, SendAssign, SendEndedAck, SendStop
from broker.policy.estimate import blend, profiled_step_s
from broker.protocol.states import Reason, RequestState
from broker.state.events import (
    Now,
    RequestCancelled,
    RequestDropped,
    RequestEnded,
    RequestPlaced,
    RequestProgressed,
    RequestSubmitted,
)
from broker.state.model import Allocation, Request, State


def submitted(state: State, event: RequestSubmitted, now: Now) -> list[AnyCommand]:
    request = Request(
        id=event.request_id,
        spec=event.spec,
        uid=event.uid,
        user=event.user,
        account=event.account,
        pool=event.pool,
        submit_key=event.submit_key,
        submit_unix_s=now.unix_s,
    )
    state.requests[request.id] = request
    state.by_key[request.submit_key] = request.id
    state.counters.request_id = max(state.counters.request_id, request.id)
    state.touch(request)
    return []


def placed(state: State, event: RequestPlaced, now: Now) -> list[AnyCommand]:
    request, allocation = state.requests[event.request_id], state.allocations[event.allocation_id]
    accrue(state, allocation, now)
    request.state = RequestState.RUNNING
    request.reason = Reason.NONE
    request.attempt = event.attempt
    request.allocation_id = allocation.id
    request.allocation, request.job_id, request.node = allocation.name, allocation.job_id, allocation.node
    request.start_unix_s = request.start_unix_s or now.unix_s
    allocation.running[request.id] = event.attempt
    state.touch(request, allocation)
    return [SendAssign(allocation.id, request.id, event.attempt)]


def progressed(state: State, event: RequestProgressed, now: Now) -> list[AnyCommand]:
    request = _attempt(state, event.request_id, event.attempt, event.allocation_id)
    if request is None:
        return []
    request.step = max(request.step, event.step)
    request.loss = event.loss if event.loss is not None else request.loss
    request.score = event.score if event.score is not None else request.score
    request.start = event.start or request.start
    request.lookup_s = event.lookup_s or request.lookup_s
    request.step_id = event.step_id or request.step_id
    if event.remaining_s is not None:
        request.predicted_finish_unix_s = now.unix_s + event.remaining_s
    if event.first_step_unix_s and not request.first_step_unix_s:
        request.first_step_unix_s = event.first_step_unix_s
        learned = state.knowledge(request.pool)
        overhead_s = event.first_step_unix_s - request.start_unix_s  # on two hosts' clocks
        learned.overhead_s = blend(learned.overhead_s, max(0.0, overhead_s))
    if not event.ephemeral:
        state.touch(request)
    return []


def ended(state: State, event: RequestEnded, now: Now) -> list[AnyCommand]:
    """Accepts the result of the current attempt from the current holder, once; anything older is only acknowledged."""
    ack = SendEndedAck(event.allocation_id, event.request_id, event.attempt)
    request = _attempt(state, event.request_id, event.attempt, event.allocation_id)
    allocation = state.allocations.get(event.allocation_id)
    if request is None or allocation is None or allocation.epoch != event.epoch:
        return [ack]
    request.step, request.loss, request.score = event.step, event.loss, event.score
    request.error, request.result = event.error, event.result
    final = event.state if event.state.final else RequestState.FAILED
    request.exit_code = 0 if final is RequestState.COMPLETED else 1
    _learn(state, request, allocation, now)
    return [ack, *finish(state, request, final, now)]


def cancelled(state: State, event: RequestCancelled, now: Now) -> list[AnyCommand]:
    request = state.requests[event.request_id]
    request.cancelled_by, request.exit_code = event.by_uid, 1
    stop = _stop(request, "cancelled")
    return [*stop, *finish(state, request, RequestState.CANCELLED, now)]


def dropped(state: State, event: RequestDropped, now: Now) -> list[AnyCommand]:
    request = state.requests[event.request_id]
    request.error, request.exit_code = "the deadline passed, and --on-miss=drop was given", 1
    stop = _stop(request, "deadline")
    return [*stop, *finish(state, request, RequestState.DEADLINE, now)]


def finish(state: State, request: Request, final: RequestState, now: Now) -> list[AnyCommand]:
    """Gives the request its final state; the state forgets it, the journal keeps it."""
    _release(state, request, now)
    request.state, request.reason, request.end_unix_s = final, Reason.NONE, now.unix_s
    del state.requests[request.id]
    state.by_key.pop(request.submit_key, None)
    state.touch(request)
    return [ForgetCheckpoint(request.id)]


def requeue(state: State, request: Request, now: Now) -> None:
    """Back to the queue after the loss of its worker, which is not the request's failure: it goes on from its
    checkpoint."""
    _release(state, request, now)
    request.state, request.reason = RequestState.PENDING, Reason.WORKER_LOST
    request.predicted_finish_unix_s = 0.0
    state.touch(request)


def accrue(state: State, allocation: Allocation, now: Now) -> None:
    """Books the GPU-seconds since the last call to the requests that shared the worker, in equal parts."""
    elapsed_s = max(0.0, now.mono_s - allocation.accrued_mono_s) if allocation.accrued_mono_s else 0.0
    if allocation.running:
        gpus = max(1, state.site.pools[allocation.pool].gpus_per_worker)
        for request_id in allocation.running:
            state.requests[request_id].gpu_s += elapsed_s * gpus / len(allocation.running)
    allocation.accrued_mono_s, allocation.accrued_unix_s = now.mono_s, now.unix_s


def _release(state: State, request: Request, now: Now) -> None:
    allocation = state.allocations.get(request.allocation_id)
    request.allocation_id = 0
    if allocation is None:
        return
    accrue(state, allocation, now)
    allocation.running.pop(request.id, None)
    if not allocation.running:
        allocation.idle_since_mono_s, allocation.idle_since_unix_s = now.mono_s, now.unix_s
    state.touch(allocation)


def _attempt(state: State, request_id: int, attempt: int, allocation_id: int) -> Request | None:
    request = state.requests.get(request_id)
    if request is None or request.attempt != attempt or request.allocation_id != allocation_id:
        return None
    return request


def _stop(request: Request, reason: str) -> list[AnyCommand]:
    if request.state is not RequestState.RUNNING:
        return []
    return [SendStop(request.allocation_id, request.id, request.attempt, reason)]


def _learn(state: State, request: Request, allocation: Allocation, now: Now) -> None:
    if request.attempt != 1 or not request.step or not request.first_step_unix_s:
        return
    learned = state.knowledge(request.pool)
    learned.steps = blend(learned.steps, request.step)
    observed_step_s = max(0.0, now.unix_s - request.first_step_unix_s) / request.step
    learned.stretch = blend(learned.stretch, observed_step_s / profiled_step_s(learned, len(allocation.running)))

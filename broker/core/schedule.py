"""From the policy's plan, and from what is overdue, to the events that the journal records."""

from __future__ import annotations

from collections.abc import Iterable, Set

from broker.allocations import JobReport, JobState
from broker.core.commands import AnyCommand, CancelJob, SubmitAllocation
from broker.policy.plan import plan
from broker.protocol.states import AllocationState
from broker.state.events import (
    AllocationDrained,
    AllocationObserved,
    AllocationOrdered,
    AnyEvent,
    Now,
    RequestDropped,
    RequestPlaced,
    WorkerLost,
)
from broker.state.model import Allocation, State

DRAIN_GRACE_S = 60.0


def decide(state: State, now: Now) -> list[AnyEvent]:
    """The decisions of one look at the state, in the order in which to apply them. Waiting requests learn their reason
    and predicted finish on the way, which is not worth an event."""
    decided: list[AnyEvent] = list(_overdue(state, now))
    if decided:
        return decided  # the next look sees their effect
    result = plan(state, now)
    decided += [RequestDropped(request_id=i) for i in result.drops]
    for request_id, allocation_id in result.placements:
        attempt = state.requests[request_id].attempt + 1
        epoch = state.allocations[allocation_id].epoch
        decided.append(RequestPlaced(request_id=request_id, allocation_id=allocation_id, attempt=attempt, epoch=epoch))
    for number, (pool, reason) in enumerate(result.orders, state.counters.allocation_id + 1):
        name = f"pt-{pool}-{number}-{state.tag}"
        decided.append(AllocationOrdered(allocation_id=number, name=name, pool=pool, reason=reason))
    decided += [AllocationDrained(allocation_id=i, reason=reason) for i, reason in result.drains]
    for request_id, why in result.reasons.items():
        request = state.requests[request_id]
        request.reason, request.predicted_finish_unix_s = why, result.finish_unix_s[request_id]
    state.outlook = result.outlook
    return decided


def _overdue(state: State, now: Now) -> Iterable[AnyEvent]:
    timeout_s = state.site.limits.worker_timeout
    for allocation in state.allocations.values():
        if allocation.state is AllocationState.DRAINING:
            # Again at every grace period: a cancel may itself have been lost.
            if now.mono_s - allocation.draining_since_mono_s > DRAIN_GRACE_S:
                yield WorkerLost(allocation_id=allocation.id, reason=allocation.reason or "did not end when drained")
        elif allocation.epoch and now.mono_s - allocation.heard_mono_s > timeout_s:
            yield WorkerLost(allocation_id=allocation.id, reason=f"silent for {timeout_s:.0f} s")


def observe(state: State, reports: list[JobReport], in_flight: Set[int]) -> tuple[list[AnyEvent], list[AnyCommand]]:
    """What a poll of all jobs says: events for allocations whose job changed or is gone, and cancels for jobs that
    carry our tag and that no allocation knows. `in_flight` are the allocations whose submission has not been
    answered."""
    happened: list[AnyEvent] = []
    strays: list[AnyCommand] = []
    seen: dict[str, JobReport] = {r.name: r for r in reports}
    names = {a.name: a for a in state.allocations.values()}
    for report in reports:
        allocation = names.get(report.name)
        if allocation is None:
            if report.state is not JobState.ENDED and report.name.endswith(f"-{state.tag}"):
                strays.append(CancelJob(report.job_id, 0))
        elif _news(allocation, report):
            happened.append(
                AllocationObserved(
                    allocation_id=allocation.id,
                    job_id=report.job_id,
                    state=report.state,
                    reason=report.reason,
                    node=report.node,
                    start_unix_s=report.start_unix_s,
                    end_unix_s=report.end_unix_s,
                )
            )
    for allocation in state.allocations.values():
        if allocation.name in seen or allocation.id in in_flight:
            continue
        if allocation.job_id or allocation.state is AllocationState.DRAINING:
            happened.append(
                AllocationObserved(
                    allocation_id=allocation.id, job_id=allocation.job_id, state=JobState.ENDED, reason="gone"
                )
            )
    return happened, strays


def _news(allocation: Allocation, report: JobReport) -> bool:
    waiting = allocation.state in (AllocationState.ORDERED, AllocationState.PENDING)
    return (
        report.state is JobState.ENDED
        or (waiting and report.state is JobState.RUNNING)
        or allocation.job_id != report.job_id
        or bool(report.end_unix_s and report.end_unix_s != allocation.end_unix_s)
    )


def recover(state: State, now: Now) -> list[AnyCommand]:
    """After the journal was read again: connections are gone, intervals count anew, and an order that was journalled is
    submitted again, which its unique name makes safe."""
    commands: list[AnyCommand] = []
    for allocation in state.allocations.values():
        allocation.connected = False
        allocation.heard_mono_s = allocation.draining_since_mono_s = now.mono_s
        idle_s = max(0.0, now.unix_s - allocation.idle_since_unix_s) if allocation.idle_since_unix_s else 0.0
        allocation.idle_since_mono_s = now.mono_s - idle_s
        away_s = max(0.0, now.unix_s - allocation.accrued_unix_s) if allocation.accrued_unix_s else 0.0
        allocation.accrued_mono_s = now.mono_s - away_s
        if not allocation.job_id and allocation.state is AllocationState.ORDERED:
            commands.append(SubmitAllocation(allocation.id))
        elif allocation.job_id and allocation.state is AllocationState.DRAINING:
            commands.append(CancelJob(allocation.job_id, allocation.id))
    return commands

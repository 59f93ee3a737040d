"""What single events do, where the order of things is what matters."""

from __future__ import annotations

import pytest

from broker.allocations import JobReport, JobState
from broker.core.commands import CancelJob, ForgetAllocation, Greet, SendAssign, SendDrain, SendStop, SubmitAllocation
from broker.core.schedule import decide, recover
from broker.policy.estimate import cold_start_s, remaining_s
from broker.protocol.messages import Running
from broker.protocol.states import AllocationState, Reason, RequestState
from broker.state import events
from tests.unit.broker.worlds import World, pool, site


def running(world: World) -> tuple[int, int]:
    """A request on a warm worker: (request, allocation)."""
    allocation = world.worker()
    request = world.admit()
    world.decide()
    assert world.state.requests[request].allocation_id == allocation
    return request, allocation


def test_a_lost_workers_requests_go_on_elsewhere_with_a_new_attempt() -> None:
    world = World()
    request, first = running(world)
    world.apply(events.WorkerLost(allocation_id=first, reason="silent"))
    record = world.state.requests[request]
    assert (record.state, record.reason) == (RequestState.PENDING, Reason.WORKER_LOST)
    second = world.worker()
    world.decide()
    assert (record.attempt, record.allocation_id) == (2, second)


def test_a_silent_worker_is_given_up_after_the_timeout_and_not_before() -> None:
    world = World()
    request, allocation = running(world)
    world.tick(world.state.site.limits.worker_timeout - 1)
    world.decide()
    assert world.state.requests[request].allocation_id == allocation
    world.tick(2)
    world.decide()
    assert world.state.requests[request].state is RequestState.PENDING
    assert world.state.allocations[allocation].state is AllocationState.DRAINING


def test_a_cancelled_request_is_stopped_on_its_worker_and_its_late_result_refused() -> None:
    world = World()
    request, allocation = running(world)
    epoch = world.state.allocations[allocation].epoch
    commands = world.apply(events.RequestCancelled(request_id=request, by_uid=7))
    assert SendStop(allocation, request, 1, "cancelled") in commands
    late = events.RequestEnded(
        allocation_id=allocation, epoch=epoch, request_id=request, attempt=1, state=RequestState.COMPLETED, step=9
    )
    assert len(world.apply(late)) == 1
    ended = world.ended[request]
    assert (ended.state, ended.cancelled_by) == (RequestState.CANCELLED, 7)


@pytest.mark.parametrize("state", [RequestState.PENDING, RequestState.RUNNING])
def test_an_end_that_is_no_final_state_still_ends_the_request(state: RequestState) -> None:
    world = World()
    request, _ = running(world)
    world.finish(request, state)
    assert world.ended[request].state is RequestState.FAILED


def test_a_worker_that_registers_again_keeps_what_it_holds_and_hears_what_it_missed() -> None:
    world = World()
    request, allocation = running(world)
    epoch = world.state.allocations[allocation].epoch
    held = [Running(request_id=request, attempt=1), Running(request_id=77, attempt=3)]
    commands = world.register(allocation, f"worker-{allocation}", held)
    assert commands == [Greet(allocation, ((77, 3),))]
    assert world.state.allocations[allocation].epoch == epoch
    commands = world.register(allocation, f"worker-{allocation}", [])
    assert commands == [Greet(allocation, ()), SendAssign(allocation, request, 1)]


def test_a_workers_own_word_for_its_job_does_not_replace_the_providers() -> None:
    world = World()
    allocation = world.worker()
    world.apply(
        events.WorkerRegistered(
            allocation_id=allocation,
            epoch=world.state.allocations[allocation].epoch,
            incarnation=f"worker-{allocation}",
            job_id="what the worker believes",
            restart_count=0,
            host="node1",
            gpus="0",
            end_unix_s=0.0,
            running=[],
        )
    )
    assert world.state.allocations[allocation].job_id == f"j{allocation}"


def test_a_drained_worker_whose_trainer_restarts_stays_drained() -> None:
    world = World()
    _, allocation = running(world)
    epoch = world.state.allocations[allocation].epoch
    world.apply(events.AllocationDrained(allocation_id=allocation, reason="idle"))
    world.apply(
        events.WorkerLeaving(
            allocation_id=allocation, epoch=epoch, reason="died", given_back=[], final=False, restarting=True
        )
    )
    assert world.state.allocations[allocation].state is AllocationState.DRAINING


def test_a_worker_that_restarts_its_trainer_takes_nothing_until_it_is_ready() -> None:
    world = World()
    request, allocation = running(world)
    epoch = world.state.allocations[allocation].epoch
    back = [Running(request_id=request, attempt=1)]
    world.apply(
        events.WorkerLeaving(
            allocation_id=allocation, epoch=epoch, reason="died", given_back=back, final=False, restarting=True
        )
    )
    world.decide()
    assert world.state.requests[request].state is RequestState.PENDING
    world.ready(allocation)
    world.decide()
    assert world.state.requests[request].allocation_id == allocation


def test_a_drain_reaches_a_worker_by_word_and_a_waiting_job_by_its_cancellation() -> None:
    world = World()
    warm, waiting, unknown = world.worker(), world.order(), world.order(job=False)
    drain = [world.apply(events.AllocationDrained(allocation_id=i, reason="idle")) for i in (warm, waiting, unknown)]
    assert drain == [[SendDrain(warm, "idle")], [CancelJob(f"j{waiting}", waiting)], []]
    late = world.apply(events.AllocationSubmitted(allocation_id=unknown, job_id="j99"))
    assert late == [CancelJob("j99", unknown)], "the answer to the order comes after the drain"


def test_a_drained_worker_that_does_not_end_is_cancelled_again_and_again() -> None:
    world = World()
    _, allocation = running(world)
    world.apply(events.AllocationDrained(allocation_id=allocation, reason="idle"))
    for _ in range(2):
        world.tick(61)
        decided = decide(world.state, world.now)
        assert [type(e) for e in decided] == [events.WorkerLost]
        assert CancelJob(f"j{allocation}", allocation) in world.apply(decided[0])


def test_an_allocation_refused_for_good_pauses_its_pool_each_time_for_longer() -> None:
    world = World()
    pauses = []
    for _ in range(12):
        allocation = world.order(job=False)
        world.apply(events.AllocationRefused(allocation_id=allocation, error="bad account"))
        pauses.append(world.state.health["a"].paused_until_unix_s - world.now.unix_s)
    assert pauses == sorted(pauses)
    assert pauses[0] < pauses[3] < pauses[-1] <= 300
    assert world.state.health["a"].reason == "bad account"
    world.worker()
    assert "a" not in world.state.health


def test_a_pool_may_fail_for_weeks() -> None:
    world = World()
    for _ in range(1100):
        allocation = world.order(job=False)
        world.apply(events.AllocationRefused(allocation_id=allocation, error="bad account"))
    assert world.state.health["a"].paused_until_unix_s == world.now.unix_s + 300


def test_a_preempted_worker_that_had_served_does_not_pause_the_pool() -> None:
    world = World()
    request, allocation = running(world)
    commands = world.poll(world.report(allocation, JobState.ENDED, reason="PREEMPTED"))
    assert not world.state.health
    assert world.state.requests[request].state is RequestState.PENDING
    assert commands == [ForgetAllocation(allocation, f"pt-a-{allocation}-cafe0001")]


def test_a_job_that_a_poll_no_longer_shows_has_ended() -> None:
    world = World()
    request, allocation = running(world)
    world.poll()
    assert allocation not in world.state.allocations
    assert world.state.requests[request].state is RequestState.PENDING


def test_a_worker_may_be_quicker_than_the_answer_to_its_order() -> None:
    world = World()
    allocation = world.order(job=False)
    world.apply(
        events.WorkerRegistered(
            allocation_id=allocation,
            epoch=1,
            incarnation="one",
            job_id="j1",
            restart_count=0,
            host="n",
            gpus="0",
            end_unix_s=0.0,
            running=[],
        )
    )
    world.poll(in_flight=frozenset({allocation}))  # a poll from before its submission
    assert world.state.allocations[allocation].state is AllocationState.LOADING


def test_an_unknown_job_with_our_tag_is_cancelled_and_others_are_left_alone() -> None:
    ours = JobReport(name="pt-a-9-cafe0001", job_id="900", state=JobState.RUNNING)
    theirs = JobReport(name="pt-a-9-beef0002", job_id="901", state=JobState.RUNNING)
    gone = JobReport(name="pt-a-8-cafe0001", job_id="899", state=JobState.ENDED)
    assert World().poll(ours, theirs, gone) == [CancelJob("900", 0)]


def test_after_a_restart_orders_without_an_answer_are_repeated_and_drains_go_on() -> None:
    world = World()
    unanswered, drained = world.order(job=False), world.order()
    warm = world.worker()
    world.apply(events.AllocationDrained(allocation_id=drained, reason="x"))
    world.tick(1000)
    assert recover(world.state, world.now) == [SubmitAllocation(unanswered), CancelJob(f"j{drained}", drained)]
    assert not world.state.allocations[warm].connected
    assert not [e for e in decide(world.state, world.now) if isinstance(e, events.WorkerLost)], "its silence was ours"


def test_gpu_seconds_are_shared_in_equal_parts() -> None:
    world = World(site(a=pool(gpus_per_worker=4)))
    first, _ = running(world)
    world.tick(10)
    second = world.admit()
    world.decide()
    world.tick(10)
    world.finish(first)
    world.tick(10)
    world.finish(second)
    assert world.ended[first].gpu_s == pytest.approx(4 * 15)
    assert world.ended[second].gpu_s == pytest.approx(4 * 15)


def test_clocks_that_differ_between_hosts_never_make_an_estimate_negative() -> None:
    world = World()
    allocation = world.order()
    ahead = world.now.unix_s + 90
    world.poll(world.report(allocation, JobState.RUNNING, start_unix_s=ahead))
    world.register(allocation)
    world.ready(allocation)
    request = world.admit()
    world.decide()
    world.apply(
        events.RequestStarted(
            allocation_id=allocation,
            request_id=request,
            attempt=1,
            step=1,
            first_step_unix_s=world.now.unix_s - 90,
        )
    )
    learned = world.state.knowledge("a")
    assert cold_start_s(learned) >= 0
    assert learned.overhead_s >= 0
    assert remaining_s(world.state.requests[request], learned, 1) > 0

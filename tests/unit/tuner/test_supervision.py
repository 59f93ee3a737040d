"""The supervisor's decisions, without sockets or processes."""

from __future__ import annotations

import itertools
from typing import Any, TypeVar

import pytest

from broker.protocol.config import WorkerConfig
from broker.protocol.messages import (
    Assign,
    Ended,
    EndedAck,
    ErrorReply,
    Goodbye,
    HeartbeatAck,
    Leaving,
    Profile,
    Progress,
    Ready,
    Register,
    Registered,
    Reregister,
    Running,
    Stop,
)
from broker.protocol.spec import RequestSpec
from broker.protocol.states import RequestState
from tuner.actions import Action, EndStep, Exit, StartStep, StartTrainer, StopTrainer, ToBroker, ToTrainer
from tuner.link import GaveBack, GiveBack, Loaded, Unloadable
from tuner.place import Place
from tuner.supervision import EXIT_ORPHANED, EXIT_REFUSED, Supervision

CONFIG = WorkerConfig(
    allocation="pt-a-1",
    key="secret",
    broker="ipc:///nowhere",
    server_public_key=None,
    pool="a",
    model="m",
    model_path="/m",
    slots=4,
    gpus=1,
    checkpoint_dir="/c",
    bank_dir="/b",
    heartbeat_s=5.0,
    orphan_timeout_s=900.0,
    checkpoint_s=5.0,
    steps=True,
)
PLACE = Place(incarnation="abc", job_id="7", restart_count=0, host="n1", gpus="0", pid=99, end_unix_s=0.0)
LOADED = Loaded(phases_s={"read": 1.0}, profile=Profile(base_s=0.1, per_request_s=0.01))
A = TypeVar("A")


def assign(request_id: int, attempt: int = 1) -> Assign:
    spec = RequestSpec(model="m", train="0" * 64)
    rows = {"train": b"", "eval": None}
    return Assign(request_id=request_id, attempt=attempt, user="alice", uid=1, account="x", spec=spec, **rows)


def running(request_id: int, attempt: int = 1) -> Running:
    return Running(request_id=request_id, attempt=attempt)


def ended(request_id: int, attempt: int = 1, state: RequestState = RequestState.COMPLETED) -> Ended:
    return Ended(epoch=0, request_id=request_id, attempt=attempt, state=state, step=5)


def told(actions: list[Action], kind: type[A]) -> list[A]:
    """What of `kind` goes to the broker."""
    return [action.message for action in actions if isinstance(action, ToBroker) and isinstance(action.message, kind)]


def passed_on(actions: list[Action]) -> list[Any]:
    return [action.message for action in actions if isinstance(action, ToTrainer)]


def done(actions: list[Action], kind: type[A]) -> list[A]:
    return [action for action in actions if isinstance(action, kind)]


def fresh(**changes: Any) -> Supervision:
    core = Supervision(CONFIG, PLACE)
    assert core.begin(now_s=100.0, age_s=0.5, end_in_s=changes.get("end_in_s")) == []
    return core


@pytest.fixture
def warm() -> Supervision:
    """Registered with epoch 3 at 101 s, its trainer loaded."""
    core = fresh()
    assert len(told(core.connected(100.5), Register)) == 1
    core.from_broker(Registered(epoch=3), 101.0)
    assert done(core.tick(101.0, 0.0), StartTrainer)
    [ready] = told(core.from_trainer(LOADED, 102.0), Ready)
    assert ready.phases_s == {"start": 1.5, "read": 1.0} and ready.epoch == 3
    return core


def test_the_trainer_starts_even_when_no_broker_answers() -> None:
    core = fresh()
    assert not done(core.tick(100.5, 0.0), StartTrainer)
    assert len(done(core.tick(101.1, 0.0), StartTrainer)) == 1
    assert not done(core.tick(102.0, 0.0), StartTrainer)


def test_an_unanswered_register_is_said_again_at_least_every_two_seconds() -> None:
    core = fresh()
    core.connected(100.0)
    said = [now for now in (100.0 + tenth / 10 for tenth in range(200)) if told(core.tick(now, 0.0), Register)]
    gaps = [after - before for before, after in itertools.pairwise(said)]
    assert len(said) >= 10 and max(gaps) < 2.2 and gaps[0] < 1


def test_a_message_of_an_old_epoch_changes_nothing(warm: Supervision) -> None:
    warm.from_broker(assign(1), 103.0)
    assert warm.from_broker(Registered(epoch=2, drop=[running(1)]), 104.0) == []
    assert warm.from_broker(HeartbeatAck(epoch=2), 104.0) == []
    [register] = told(warm.from_broker(Reregister(reason=""), 105.0), Register)
    assert register.running == [running(1)]


def test_nothing_but_register_is_said_to_a_broker_that_does_not_know_us(warm: Supervision) -> None:
    warm.from_broker(assign(1), 103.0)
    warm.disconnected(104.0)
    assert warm.from_trainer(Progress(epoch=0, request_id=1, attempt=1, step=1, start="random"), 104.5) == []
    assert told(warm.from_trainer(ended(1), 105.0), Ended) == []
    actions = warm.connected(106.0)
    assert [type(action.message) for action in done(actions, ToBroker)] == [Register]
    assert told(actions, Register)[0].running == [running(1)]  # ended, yet not handed in: still ours
    assert told(warm.from_broker(Registered(epoch=4), 106.1), Ended)[0].epoch == 4


def test_a_reregister_while_one_is_under_way_does_not_start_another(warm: Supervision) -> None:
    assert told(warm.from_broker(Reregister(reason="a"), 103.0), Register)
    assert not told(warm.from_broker(Reregister(reason="b"), 103.0), Register)


def test_what_only_an_earlier_progress_told_stays_in_later_ones(warm: Supervision) -> None:
    warm.from_broker(assign(1), 103.0)
    first = Progress(epoch=0, request_id=1, attempt=1, step=1, start="random", first_step_unix_s=5.0, loss=2.0)
    warm.from_trainer(first, 103.0)
    warm.step_known((1, 1), "7.2")
    [later] = told(warm.from_trainer(Progress(epoch=0, request_id=1, attempt=1, step=2), 104.0), Progress)
    assert (later.step, later.start, later.step_id) == (2, "random", "7.2")
    assert (later.first_step_unix_s, later.loss) == (5.0, 2.0)


def test_a_repeated_assign_starts_nothing_twice(warm: Supervision) -> None:
    actions = warm.from_broker(assign(1), 103.0)
    assert passed_on(actions) == [assign(1)] and done(actions, StartStep) == [StartStep(1, 1, "alice")]
    assert warm.from_broker(assign(1), 104.0) == []
    warm.from_trainer(ended(1), 105.0)
    again = warm.from_broker(assign(1), 106.0)
    assert told(again, Ended) and not passed_on(again)


def test_a_newer_attempt_voids_the_older_one(warm: Supervision) -> None:
    warm.from_broker(assign(1), 103.0)
    stop, start = passed_on(warm.from_broker(assign(1, attempt=2), 104.0))
    assert isinstance(stop, Stop) and (stop.attempt, start.attempt) == (1, 2)
    assert not told(warm.from_trainer(ended(1, attempt=1), 105.0), Ended)
    assert told(warm.from_trainer(ended(1, attempt=2), 105.0), Ended)


@pytest.mark.parametrize(("state", "ok"), [(RequestState.COMPLETED, True), (RequestState.FAILED, False)])
def test_a_step_ends_as_its_request_does(warm: Supervision, state: RequestState, ok: bool) -> None:
    warm.from_broker(assign(1), 103.0)
    assert done(warm.from_trainer(ended(1, state=state), 104.0), EndStep) == [EndStep(1, 1, ok)]


def test_results_are_repeated_until_acknowledged(warm: Supervision) -> None:
    warm.from_broker(assign(1), 103.0)
    warm.from_trainer(ended(1), 103.0)
    assert told(warm.tick(110.0, 0.0), Ended)
    assert told(warm.tick(115.0, 0.0), Ended)
    warm.from_broker(EndedAck(request_id=1, attempt=1), 116.0)
    assert not told(warm.tick(120.0, 0.0), Ended)


def test_leaving_waits_for_the_checkpoints_then_for_the_last_acknowledgement(warm: Supervision) -> None:
    warm.from_broker(assign(1), 103.0)
    warm.from_broker(assign(2), 103.0)
    warm.from_trainer(ended(2), 103.5)
    first = warm.signalled("SIGTERM", 104.0)
    assert passed_on(first) == [GiveBack()] and told(first, Leaving)[0].given_back == [] and not done(first, Exit)
    assert warm.signalled("SIGTERM", 104.1) == []
    second = warm.from_trainer(GaveBack(running=[running(1)]), 105.0)
    assert told(second, Leaving)[0].given_back == [running(1)] and not done(second, Exit)
    last = warm.from_broker(EndedAck(request_id=2, attempt=1), 105.5)
    assert told(last, Leaving)[0].final and done(last, Exit) == [Exit(0)]


def test_leaving_takes_seconds_even_when_nobody_answers(warm: Supervision) -> None:
    warm.from_broker(assign(1), 103.0)
    warm.from_broker(assign(2), 103.0)
    warm.from_trainer(ended(2), 103.5)
    warm.signalled("SIGTERM", 104.0)
    stuck = warm.tick(113.0, 0.0)
    assert done(stuck, StopTrainer) and told(stuck, Leaving)[0].given_back == [running(1)]
    assert done(warm.tick(117.0, 0.0), Exit) == [Exit(0)]


def test_a_leaving_worker_tells_a_restarted_broker_so(warm: Supervision) -> None:
    warm.from_broker(assign(1), 103.0)
    warm.signalled("SIGTERM", 104.0)
    [register] = told(warm.connected(104.5), Register)
    assert not register.ready and register.running == [running(1)]
    actions = warm.from_broker(Registered(epoch=4), 104.6)
    assert told(actions, Leaving) and not told(actions, Ready)


def test_any_word_of_the_broker_puts_the_orphans_end_off(warm: Supervision) -> None:
    warm.from_broker(HeartbeatAck(epoch=3), 900.0)
    warm.tick(1100.0, 0.0)
    assert not done(warm.tick(1799.0, 0.0), ToTrainer)
    assert passed_on(warm.tick(1801.0, 0.0)) == [GiveBack()]
    assert done(warm.from_trainer(GaveBack(running=[]), 1802.0), Exit) == [Exit(EXIT_ORPHANED)]


@pytest.mark.parametrize(("lifetime_s", "margin_s"), [(100.0, 10.0), (86400.0, 60.0)])
def test_the_margin_before_the_end_is_a_tenth_but_at_most_a_minute(lifetime_s: float, margin_s: float) -> None:
    core = fresh(end_in_s=lifetime_s - 0.5)
    core.connected(100.0)
    core.from_broker(Registered(epoch=1), 100.0)
    core.from_trainer(LOADED, 101.0)
    leave_s = 100.0 - 0.5 + lifetime_s - margin_s
    core.from_broker(HeartbeatAck(epoch=1), leave_s - 2)
    assert not passed_on(core.tick(leave_s - 1, 0.0))
    assert passed_on(core.tick(leave_s + 0.1, 0.0)) == [GiveBack()]


def test_an_end_that_is_learnt_late_is_told_and_heeded(warm: Supervision) -> None:
    [register] = told(warm.end_known(5000.0, 50.0, 110.0), Register)
    assert register.end_unix_s == 5000.0 and register.incarnation == "abc" and register.ready
    assert passed_on(warm.tick(159.0, 0.0)) == [GiveBack()]


def test_an_end_that_is_learnt_while_registering_is_told() -> None:
    core = fresh()
    core.connected(100.0)
    assert core.end_known(5000.0, 50.0, 100.0) == []
    assert told(core.from_broker(Registered(epoch=1), 100.1), Register)[0].end_unix_s == 5000.0
    assert not told(core.from_broker(Registered(epoch=1), 100.2), Register)


def test_deaths_are_counted_in_a_row_only(warm: Supervision) -> None:
    for round_s in (200.0, 300.0, 400.0, 500.0):
        warm.from_broker(HeartbeatAck(epoch=3), round_s)
        assert told(warm.trainer_exited(-9, round_s), Leaving)[0].restarting
        assert done(warm.tick(round_s + 2, 0.0), StartTrainer)
        assert told(warm.from_trainer(LOADED, round_s + 3), Ready)


def test_the_third_death_in_a_row_ends_the_worker(warm: Supervision) -> None:
    warm.trainer_exited(1, 200.0)
    warm.trainer_exited(1, 300.0)
    last = warm.trainer_exited(1, 400.0)
    assert told(last, Leaving)[-1].final and done(last, Exit) == [Exit(1)]


def test_an_unusable_model_is_not_tried_again() -> None:
    core = fresh()
    core.connected(100.0)
    core.from_broker(Registered(epoch=1), 100.0)
    actions = core.from_trainer(Unloadable(reason="no config.json in /m"), 101.0)
    assert told(actions, Leaving)[-1].final and "no config.json" in told(actions, Leaving)[-1].reason
    assert done(actions, Exit) == [Exit(1)]


def test_goodbye_to_a_worker_that_was_never_accepted_is_a_failure() -> None:
    core = fresh()
    core.connected(100.0)
    assert done(core.from_broker(Goodbye(reason="wrong key"), 100.1), Exit) == [Exit(EXIT_REFUSED)]


def test_a_broker_of_another_version_gets_the_worker_to_leave(warm: Supervision) -> None:
    assert passed_on(warm.incompatible("protocol version 2", 103.0)) == [GiveBack()]


def test_an_error_reply_is_survived(warm: Supervision) -> None:
    assert warm.from_broker(ErrorReply(code="Error", message="malformed"), 103.0) == []

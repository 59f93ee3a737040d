"""The broker as its users, its workers and Slurm see it: a real one in a thread, all of them played by the test."""

from __future__ import annotations

import hashlib
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from broker.allocations import JobReport, JobState
from broker.daemon import loop
from broker.protocol.errors import (
    NotFound,
    PromptTunerError,
    Refused,
    SlurmRejected,
    SlurmUnavailable,
    Transient,
    UsageError,
)
from broker.protocol.messages import (
    Accounting,
    Assign,
    Cancel,
    Cancelled,
    Drain,
    EndedAck,
    Fetch,
    FetchReply,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Info,
    InfoReply,
    Leaving,
    Progress,
    Queue,
    Requests,
    Reregister,
    Shutdown,
    ShuttingDown,
    Stop,
    Submit,
    Submitted,
    Watch,
)
from broker.protocol.rows import PoolRow, RequestRow
from broker.protocol.spec import RequestSpec
from broker.protocol.states import AllocationState, RequestState
from tests.unit.broker.daemon.conftest import LIMIT_S, ROWS, Broker, until
from tests.unit.broker.worlds import ADMIN, ALICE, BOB


def rows(broker: Broker, message: Queue | Accounting | None = None) -> dict[int, RequestRow]:
    reply = broker.client.call(message or Queue(), LIMIT_S)
    assert isinstance(reply, Requests)
    return {row.id: row for row in reply.rows}


def pool_row(broker: Broker) -> PoolRow:
    reply = broker.client.call(Info(), LIMIT_S)
    assert isinstance(reply, InfoReply)
    return reply.pools[0]


# --- the whole way --------------------------------------------------------------------------------------------------


def test_a_request_goes_from_its_submission_to_its_result(broker: Broker) -> None:
    number = broker.submit(max_steps=40)
    worker = broker.warm_worker()
    assign = worker.hear(Assign)
    assert (assign.request_id, assign.attempt, assign.user, assign.train) == (number, 1, "alice", ROWS)
    worker.say(
        Progress(epoch=worker.epoch, request_id=number, attempt=1, step=7, loss=2.5, start="random", remaining_s=9.0)
    )
    row = until(lambda: rows(broker)[number] if rows(broker)[number].step == 7 else None)
    assert (row.state, row.loss, row.start, row.attempts) == (RequestState.RUNNING, 2.5, "random", 1)
    worker.end(assign, step=40, files={"adapter_config.json": b"{}", "prompttuner.json": b"x"})
    assert worker.hear(EndedAck) == EndedAck(request_id=number, attempt=1)
    assert rows(broker) == {}
    row = rows(broker, Accounting())[number]
    assert (row.state, row.step, row.exit_code, row.job_id) == (RequestState.COMPLETED, 40, 0, "j1")
    reply = broker.client.call(Fetch(id=number), LIMIT_S)
    assert isinstance(reply, FetchReply)
    assert reply.files == {"adapter_config.json": b"{}", "prompttuner.json": b"x"}


def test_a_worker_hears_its_heartbeats_and_is_shown_with_what_it_told(broker: Broker) -> None:
    broker.submit()
    worker = broker.warm_worker()
    worker.hear(Assign)
    worker.say(Heartbeat(epoch=worker.epoch, rss_mb=123.0))
    assert worker.hear(HeartbeatAck).epoch == worker.epoch
    (shown,) = until(lambda: [a for a in pool_row(broker).allocations if a.rss_mb == 123.0])
    assert (shown.state, shown.job_id, shown.node) == (AllocationState.WARM, "j1", "node1")
    assert shown.phases_s["imports"] == 1.0


def test_a_failed_request_says_why_and_has_no_result(broker: Broker) -> None:
    number = broker.submit()
    worker = broker.warm_worker()
    worker.end(worker.hear(Assign), state=RequestState.FAILED, error="line 3 has no target", files={})
    worker.hear(EndedAck)
    row = rows(broker, Queue(ids=[number]))[number]
    assert (row.state, row.error, row.exit_code) == (RequestState.FAILED, "line 3 has no target", 1)
    with pytest.raises(NotFound, match="line 3 has no target"):
        broker.client.call(Fetch(id=number), LIMIT_S)


def test_a_cancel_stops_the_running_attempt(broker: Broker) -> None:
    number = broker.submit()
    worker = broker.warm_worker()
    worker.hear(Assign)
    reply = broker.client.call(Cancel(ids=[number, number]), LIMIT_S)
    assert reply == Cancelled(ids=[number])
    assert worker.hear(Stop).request_id == number
    assert rows(broker, Queue(ids=[number]))[number].state is RequestState.CANCELLED
    assert broker.client.call(Cancel(ids=[number]), LIMIT_S) == Cancelled(ids=[], already_ended=[number])


def test_an_idle_worker_is_drained(make_broker: Callable[..., Broker]) -> None:
    broker = make_broker(idle_window=0.2)
    broker.start()
    broker.submit()
    worker = broker.warm_worker()
    worker.end(worker.hear(Assign))
    worker.hear(EndedAck)
    assert worker.hear(Drain).reason == "idle"
    worker.say(Leaving(epoch=worker.epoch, reason="drained", final=True))
    broker.provider.end(worker.config.allocation)
    until(lambda: pool_row(broker).allocations == [])


def test_a_request_whose_job_is_gone_goes_on_elsewhere(broker: Broker) -> None:
    number = broker.submit()
    first = broker.warm_worker()
    assign = first.hear(Assign)
    broker.provider.end(first.config.allocation)
    second = broker.warm_worker(1, "two")
    again = second.hear(Assign)
    assert (again.request_id, again.attempt) == (number, 2)
    first.end(assign)
    first.hear(Reregister)
    first.say(first.registration())
    first.hear(Goodbye)
    assert rows(broker)[number].state is RequestState.RUNNING


# --- restarts -------------------------------------------------------------------------------------------------------


def test_a_restarted_broker_finds_its_worker_warm_and_the_request_ends_once(broker: Broker) -> None:
    number, waiting = broker.submit(), broker.submit(max_steps=10)
    worker = broker.warm_worker()
    assigns = {worker.hear(Assign).request_id: 1, worker.hear(Assign).request_id: 1}
    assert assigns == {number: 1, waiting: 1}
    epoch = worker.epoch
    broker.kill()
    broker.start()
    assert rows(broker).keys() == {number, waiting}
    worker.say(Heartbeat(epoch=epoch))
    worker.hear(Reregister)
    assert worker.register([(number, 1), (waiting, 1)]).drop == []
    assert worker.epoch == epoch, "the same process keeps its epoch"
    assign = Assign(request_id=number, attempt=1, user="", uid=1, account="", spec=_any_spec(), train=b"", eval=None)
    worker.end(assign)
    assert worker.hear(EndedAck) == EndedAck(request_id=number, attempt=1)
    row = rows(broker, Queue(ids=[number]))[number]
    assert (row.state, row.attempts) == (RequestState.COMPLETED, 1)
    assert len(broker.provider.orders) == 1, "no second allocation was ordered"


def _any_spec() -> RequestSpec:
    return RequestSpec(model="tiny", train="0" * 64)


def test_an_end_whose_acknowledgement_was_lost_is_acknowledged_again_and_changes_nothing(broker: Broker) -> None:
    number = broker.submit()
    worker = broker.warm_worker()
    said = worker.end(worker.hear(Assign))
    worker.hear(EndedAck)
    before = rows(broker, Queue(ids=[number]))
    broker.kill()
    broker.start()
    worker.register()
    worker.say(said)
    assert worker.hear(EndedAck) == EndedAck(request_id=number, attempt=1)
    assert rows(broker, Queue(ids=[number])) == before


def test_a_new_process_of_the_same_allocation_starts_the_request_anew(broker: Broker) -> None:
    number = broker.submit()
    first = broker.warm_worker()
    assign = first.hear(Assign)
    second = broker.worker(0, "two")
    second.register()
    assert second.epoch > first.epoch
    first.end(assign)
    first.hear(Reregister)
    second.ready()
    again = second.hear(Assign)
    assert (again.request_id, again.attempt) == (number, 2)


def test_a_watch_survives_a_restart(broker: Broker) -> None:
    number = broker.submit()
    worker = broker.warm_worker()
    assign = worker.hear(Assign)
    stream = broker.client.stream(Watch(ids=[number]), resend_s=0.1, patience_s=LIMIT_S)
    assert next(stream).row.state is RequestState.RUNNING
    broker.kill()
    broker.start(accounts=False)
    worker.register([(number, 1)])
    worker.say(Progress(epoch=worker.epoch, request_id=number, attempt=1, step=33))
    while next(stream).row.step != 33:
        pass
    worker.end(assign)
    while next(stream).row.state is not RequestState.COMPLETED:
        pass


def test_an_order_without_an_answer_is_repeated_after_a_restart(broker: Broker) -> None:
    broker.provider.submit_fault = SlurmUnavailable("slurmctld does not answer")
    number = broker.submit()
    until(lambda: pool_row(broker).allocations)
    broker.kill()
    broker.provider.submit_fault = None
    broker.start()
    assert broker.warm_worker().hear(Assign).request_id == number
    assert len(broker.provider.orders) == 1


# --- who may hold a slot --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [{"key": "wrong"}, {"key": ""}, {"key": "ä"}, {"allocation": "pt-a-7-nobody"}], ids=str
)
def test_a_worker_without_the_key_is_sent_away(broker: Broker, words: dict[str, str]) -> None:
    broker.submit()
    impostor = broker.worker()
    impostor.say(impostor.registration(**words))
    impostor.hear(Goodbye)
    impostor.say(Heartbeat(epoch=0))
    impostor.hear(Reregister)
    broker.worker().register()


def test_an_unknown_peer_and_an_old_epoch_are_asked_to_register(broker: Broker) -> None:
    number = broker.submit()
    stranger, worker = broker.worker(), broker.warm_worker()
    assign = worker.hear(Assign)
    stranger.epoch = worker.epoch
    stranger.end(assign)
    stranger.hear(Reregister)
    worker.end(assign, epoch=worker.epoch + 1)
    worker.hear(Reregister)
    assert rows(broker)[number].state is RequestState.RUNNING
    worker.end(assign)
    worker.hear(EndedAck)


# --- what clients are told ------------------------------------------------------------------------------------------


def test_a_submission_sent_again_is_the_same_request(broker: Broker) -> None:
    number = broker.submit("k" * 32)
    assert broker.submit("k" * 32) == number
    worker = broker.warm_worker()
    worker.end(worker.hear(Assign))
    worker.hear(EndedAck)
    assert broker.submit("k" * 32) == number, "also after its end"
    assert rows(broker, Accounting()).keys() == {number}


def test_the_answer_to_a_submission_names_the_cluster_and_a_finish(broker: Broker) -> None:
    reply = broker.client.call(_submission(), LIMIT_S)
    assert isinstance(reply, Submitted)
    assert (reply.id, reply.cluster) == (1, broker.site.cluster)
    assert reply.predicted_finish_unix_s


def test_a_trial_submission_leaves_nothing(broker: Broker) -> None:
    assert broker.submit(test_only=True) == 0
    assert rows(broker, Accounting()) == {}
    assert broker.submit() == 1


def _submission(**fields: Any) -> Submit:
    digest = hashlib.sha256(ROWS).hexdigest()
    words: dict[str, Any] = {
        "spec": RequestSpec(model="tiny", train=digest),
        "submit_key": "k" * 32,
        "blobs": {digest: ROWS},
    }
    return Submit(**(words | fields))


@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [
        (_submission(blobs={}), UsageError, "lacks data"),
        (_submission(blobs={hashlib.sha256(ROWS).hexdigest(): b"other"}), UsageError, "does not have the digest"),
        (_submission(spec=RequestSpec(model="tiny", train="0" * 64)), UsageError, "does not name"),
        (_submission(spec=RequestSpec(model="none", train="0" * 64)), Refused, "unknown model"),
        (Fetch(id=77), NotFound, "no such request: 77"),
        (Fetch(id=2**63 - 1), NotFound, "no such request"),
        (Queue(ids=[77]), NotFound, "no such request: 77"),
        (Cancel(ids=[77]), NotFound, "no such request: 77"),
        (Cancel(), UsageError, "which requests"),
        (Watch(ids=[77]), NotFound, "no such request: 77"),
        (Watch(ids=list(range(1, 1002))), UsageError, "1000 are allowed"),
        (Queue(ids=[1] * 1_000_000), PromptTunerError, "length <= 20000"),
        (Cancel(ids=[1] * 1_000_000), PromptTunerError, "length <= 20000"),
        (Shutdown(), Refused, "admin"),
    ],
)
def test_a_refusal_names_its_reason_and_changes_nothing(
    broker: Broker, message: Any, kind: type[PromptTunerError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        broker.client.call(message, LIMIT_S)
    assert rows(broker, Accounting()) == {}
    assert broker.submit() == 1


@pytest.mark.parametrize("word", [Queue, Cancel, Accounting, Watch])
def test_anothers_request_is_told_like_none(broker: Broker, word: Any) -> None:
    number = broker.submit("k" * 32)
    broker.caller.identity = BOB
    with pytest.raises(NotFound) as hidden:
        broker.client.call(word(ids=[number]), LIMIT_S)
    with pytest.raises(NotFound) as missing:
        broker.client.call(word(ids=[number + 1]), LIMIT_S)
    assert str(hidden.value).replace(str(number), "N") == str(missing.value).replace(str(number + 1), "N")
    assert rows(broker) == rows(broker, Accounting()) == {}
    with pytest.raises(NotFound):
        broker.client.call(Fetch(id=number), LIMIT_S)
    with pytest.raises(NotFound):
        broker.submit("k" * 32)
    broker.caller.identity = ADMIN
    assert rows(broker).keys() == {number}
    broker.caller.identity = ALICE
    assert rows(broker)[number].state is RequestState.PENDING


def test_a_result_is_not_there_before_the_end(broker: Broker) -> None:
    number = broker.submit()
    with pytest.raises(Refused, match="PENDING"):
        broker.client.call(Fetch(id=number), LIMIT_S)


def test_an_admin_stops_the_broker_and_its_workers(broker: Broker) -> None:
    broker.submit()
    worker = broker.warm_worker()
    worker.hear(Assign)
    broker.caller.identity = ADMIN
    assert broker.client.call(Shutdown(end_workers=True), LIMIT_S) == ShuttingDown(workers=1)
    worker.hear(Drain)
    until(lambda: not broker.serving)
    assert broker.provider.cancelled == ["j1"]


# --- faults ---------------------------------------------------------------------------------------------------------


def test_nothing_is_taken_before_the_accounts_are_known(make_broker: Callable[..., Broker]) -> None:
    broker = make_broker()
    broker.provider.accounts_fault = SlurmUnavailable("slurmdbd does not answer")
    broker.start(accounts=False)
    with pytest.raises(Transient, match="accounts") as caught:
        broker.submit()
    assert caught.value.exit_code == 75
    assert rows(broker) == {}, "everything else is answered"
    broker.provider.accounts_fault = None
    until(broker._takes_requests)


def test_what_slurm_refuses_for_good_pauses_the_pool_and_says_why(broker: Broker) -> None:
    broker.provider.submit_fault = SlurmRejected("Invalid account or account/partition combination")
    number = broker.submit()
    shown = until(lambda: pool_row(broker) if not pool_row(broker).available else None)
    assert shown.reason == "Invalid account or account/partition combination"
    until(lambda: rows(broker)[number].reason == "PoolDown")
    broker.provider.submit_fault = None
    assert broker.warm_worker().hear(Assign).request_id == number
    assert until(lambda: pool_row(broker).available)


@pytest.mark.parametrize("fault", [SlurmUnavailable("no answer"), ValueError("a bug")], ids=["unavailable", "bug"])
def test_an_order_that_failed_in_passing_is_repeated(broker: Broker, fault: Exception) -> None:
    broker.provider.submit_fault = fault
    number = broker.submit()
    name = until(lambda: pool_row(broker).allocations)[0].name
    broker.provider.submit_fault = None
    assert broker.warm_worker().hear(Assign).request_id == number
    assert [o.name for o in broker.provider.orders] == [name]
    assert pool_row(broker).available


@pytest.mark.parametrize("fault", [SlurmUnavailable("no answer"), ValueError("a bug")], ids=["unavailable", "bug"])
def test_polls_go_on_after_one_that_failed_and_no_answer_is_not_an_end(broker: Broker, fault: Exception) -> None:
    number = broker.submit()
    worker = broker.warm_worker()
    worker.hear(Assign)
    broker.provider.poll_fault = fault
    polls = broker.provider.polls
    until(lambda: broker.provider.polls > polls + 2)
    assert rows(broker)[number].state is RequestState.RUNNING
    broker.provider.poll_fault = None
    broker.provider.end(worker.config.allocation)
    until(lambda: len(broker.provider.orders) == 2)


def test_a_job_of_ours_that_nobody_knows_is_cancelled(broker: Broker) -> None:
    for name, job_id in ((f"pt-a-99-{broker.tag}", "j99"), ("pt-a-99-another1", "j98")):
        broker.provider.jobs[name] = JobReport(name=name, job_id=job_id, state=JobState.RUNNING)
    until(lambda: broker.provider.cancelled)
    polls = broker.provider.polls
    until(lambda: broker.provider.polls > polls + 2)
    assert set(broker.provider.cancelled) == {"j99"}


def test_a_spool_that_cannot_be_written_is_waited_for(broker: Broker) -> None:
    folder = broker.folder / "spool" / "allocations"
    shutil.rmtree(folder)
    folder.touch()
    number = broker.submit()
    until(lambda: pool_row(broker).allocations)
    folder.unlink()
    folder.mkdir()
    assert broker.warm_worker().hear(Assign).request_id == number


def test_a_spool_that_cannot_be_pruned_does_not_end_the_broker(
    make_broker: Callable[..., Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PRUNE_S", 0.01)
    broker = make_broker()
    broker.start()
    folder = broker.folder / "spool" / "allocations"
    shutil.rmtree(folder)
    folder.touch()
    polls = broker.provider.polls
    until(lambda: broker.provider.polls > polls + 3)
    assert rows(broker) == {}


@pytest.fixture
def disk() -> Iterator[Callable[[int], None]]:
    """Limits how large this process's files may get, as a full disk would."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, previous)


def test_a_full_disk_stops_acknowledgements_and_nothing_else(broker: Broker, disk: Callable[[int], None]) -> None:
    number = broker.submit()
    worker = broker.warm_worker()
    assign = worker.hear(Assign)
    disk(max(f.stat().st_size for f in broker.folder.glob("journal.sqlite*")) + 100)
    for _ in range(3):
        with pytest.raises(Transient, match="journal cannot be written"):
            broker.submit("k" * 32, data=ROWS * 10_000)
    assert rows(broker).keys() == {number}, "what is durable is still served"
    worker.end(assign)
    worker.hear(Reregister)
    disk(resource.RLIM_INFINITY)
    epoch = worker.epoch
    worker.register([(number, 1)])
    assert worker.epoch == epoch
    worker.end(assign)
    worker.hear(EndedAck)
    assert broker.submit("k" * 32, data=ROWS * 10_000) == number + 1
    assert rows(broker, Queue(ids=[number]))[number].state is RequestState.COMPLETED

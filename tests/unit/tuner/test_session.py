"""Requests join, train together, leave and end as they would alone; one that fails takes no other with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from bank.store import Bank
from broker.protocol.messages import Assign, Ended, Progress, Running
from broker.protocol.states import RequestState
from tuner import engine, forward, packing, run
from tuner.model import Base
from tuner.session import Session


def json_lines(rows: list[tuple[str, str]]) -> bytes:
    return b"".join(json.dumps({"input": given, "target": wanted}).encode() + b"\n" for given, wanted in rows)


Said = dict[int, list[Progress | Ended]]
MakeSession = Callable[..., Session]
MakeRequest = Callable[..., Assign]

# A task that even a base without any training can be steered to within a few steps.
EASY = {
    "rows": b'{"input":"a b c","target":"d d"}\n{"input":"d b","target":"d d"}\n' * 10,
    "max_steps": 100,
    "target_score": 3.35,
}


def drive(session: Session, joins: dict[int, list[Assign]], limit: int = 400) -> dict[int, Ended]:
    """Steps until all has ended; `joins` names who joins before which step. Returns the ends by request."""
    ended: dict[int, Ended] = {}
    for step in range(limit):
        for assign in joins.get(step, []):
            session.join(assign)
        ended |= {said.request_id: said for said in session.step() if isinstance(said, Ended)}
        if not session.busy and step >= max(joins):
            return ended
    raise AssertionError("the session did not come to an end")


def curve(ended: Ended) -> list[dict[str, float]]:
    points: list[dict[str, float]] = json.loads(ended.files["prompttuner.json"])["curve"]
    return points


def prompt_of(ended: Ended) -> torch.Tensor:
    return safetensors.torch.load(ended.files["adapter_model.safetensors"])["prompt_embeddings"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_requests_in_one_pack_end_as_each_would_alone(
    make_session: MakeSession, make_request: MakeRequest, make_rows: Callable[..., bytes], family: str
) -> None:
    session = make_session(family)
    settings = [
        (0, {"virtual_tokens": 4, "batch_size": 8, "rate": 0.1, "seed": 1, "max_steps": 30}),
        (0, {"virtual_tokens": 9, "batch_size": 2, "rate": 0.05, "seed": 2, "max_steps": 23, "eval_every": 4}),
        (5, {"virtual_tokens": 1, "batch_size": 1, "rate": 0.2, "seed": 3, "max_steps": 12, "rows": make_rows(1)}),
        (9, {"virtual_tokens": 6, "batch_size": 5, "rate": 0.1, "seed": 4, "max_steps": 30, "metric": "accuracy"}),
    ]
    requests = [(step, make_request(i, **fields)) for i, (step, fields) in enumerate(settings, 1)]
    joins: dict[int, list[Assign]] = {}
    for step, assign in requests:
        joins.setdefault(step, []).append(assign)
    together = drive(session, joins)
    for _, assign in requests:
        alone = drive(session, {0: [assign]})[assign.request_id]
        packed = together[assign.request_id]
        assert packed.state is alone.state is RequestState.COMPLETED
        assert [point["step"] for point in curve(packed)] == [point["step"] for point in curve(alone)]
        for ours, theirs in zip(curve(packed), curve(alone), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert (prompt_of(packed) - prompt_of(alone)).abs().max().item() < 1e-4


def test_a_request_given_back_goes_on_bit_by_bit(make_session: MakeSession, make_request: MakeRequest) -> None:
    never_stopped = drive(make_session(), {0: [make_request(max_steps=40)]})[1]
    session = make_session()
    session.join(make_request(max_steps=40))
    for _ in range(17):
        session.step()
    assert session.give_back() == [Running(request_id=1, attempt=1)]
    assert not session.busy
    resumed = drive(make_session(), {0: [make_request(attempt=2, max_steps=40)]})[1]
    assert resumed.attempt == 2
    assert curve(resumed) == curve(never_stopped)
    assert torch.equal(prompt_of(resumed), prompt_of(never_stopped))
    assert (resumed.loss, resumed.step) == (never_stopped.loss, never_stopped.step)


def test_the_best_prompt_of_an_earlier_attempt_is_not_lost(
    make_session: MakeSession, make_request: MakeRequest
) -> None:
    wild = {"rate": 30.0, "max_steps": 12, "eval_every": 1}
    session = make_session()
    session.join(make_request(**wild))
    for _ in range(7):
        session.step()
    session.give_back()
    ended = drive(session, {0: [make_request(attempt=2, **wild)]})[1]
    assert json.loads(ended.files["prompttuner.json"])["best"]["step"] < 7
    assert torch.equal(prompt_of(ended), prompt_of(drive(session, {0: [make_request(2, **wild)]})[2]))


def test_a_lost_workers_request_goes_on_from_its_last_checkpoint(
    make_session: MakeSession, make_request: MakeRequest
) -> None:
    never_stopped = drive(make_session(), {0: [make_request(max_steps=20)]})[1]
    lost = make_session(checkpoint_s=0.0)
    lost.join(make_request(max_steps=20))
    for _ in range(7):
        lost.step()
    session = make_session()
    session.join(make_request(attempt=2, max_steps=20))
    (first,) = [said for said in session.step() if isinstance(said, Progress)]
    assert first.step == 8
    assert curve(drive(session, {0: []})[1]) == curve(never_stopped)


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(
    make_session: MakeSession, make_request: MakeRequest
) -> None:
    session = make_session()
    session.join(make_request())
    session.step()
    session.give_back()
    session.join(make_request(attempt=2, rate=0.1))
    (first,) = session.step()
    assert first.step == 1


def test_checkpoints_are_private_and_gone_at_the_end(
    make_session: MakeSession, make_request: MakeRequest, tmp_path: Path
) -> None:
    session = make_session(checkpoint_s=0.0)
    session.join(make_request(max_steps=3))
    session.step()
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert (kept.name, kept.stat().st_mode & 0o777) == ("1.safetensors", 0o600)
    drive(session, {0: []})
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_an_older_attempt_neither_replaces_nor_removes_a_later_ones_checkpoint(
    make_session: MakeSession, make_request: MakeRequest, tmp_path: Path
) -> None:
    older, newer = make_session(checkpoint_s=0.0), make_session(checkpoint_s=0.0)
    older.join(make_request(max_steps=6))
    older.step()
    newer.join(make_request(attempt=2, max_steps=6))
    newer.step()
    kept = (tmp_path / "checkpoints" / "1.safetensors").read_bytes()
    drive(older, {0: []})
    assert (tmp_path / "checkpoints" / "1.safetensors").read_bytes() == kept


def test_the_target_ends_a_request_and_the_reported_loss_is_that_of_the_prompt(
    make_session: MakeSession, make_request: MakeRequest
) -> None:
    session = make_session()
    free = drive(session, {0: [make_request(max_steps=60, eval_every=2)]})[1]
    losses = [point["loss"] for point in curve(free)]
    assert losses[-1] < losses[0]
    assert free.loss == min(losses)
    target = sorted(losses)[len(losses) // 2]
    ended = drive(session, {0: [make_request(max_steps=60, eval_every=2, target_score=target)]})[1]
    first_below = next(point for point in curve(free) if point["loss"] <= target)
    assert (ended.step, ended.loss) == (first_below["step"], pytest.approx(first_below["loss"]))
    assert ended.loss == ended.score


def test_a_first_prompt_that_reaches_the_target_is_the_result_after_one_step(
    make_session: MakeSession, make_request: MakeRequest
) -> None:
    session = make_session()
    session.join(make_request(target_score=1000.0))
    told, ended = session.step()
    assert isinstance(told, Progress) and isinstance(ended, Ended)
    assert (told.start, told.step) == ("random", 1)
    assert told.first_step_unix_s > 0
    assert (ended.state, ended.step) == (RequestState.COMPLETED, 1)
    assert [point["step"] for point in curve(ended)] == [0]


def test_the_first_word_of_a_request_tells_when_its_first_step_ended(
    make_session: MakeSession, make_request: MakeRequest
) -> None:
    import time

    session = make_session()
    before = time.time()
    session.join(make_request(max_steps=10))
    (said,) = session.step()
    assert isinstance(said, Progress)
    assert before <= said.first_step_unix_s <= time.time()
    assert (said.step, said.start) == (1, "random")
    assert said.remaining_s is not None and said.remaining_s > 0
    assert said.loss is not None


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rows": b""}, "no training rows"),
        ({"rows": b'{"input":"a","target":""}\n'}, "row 1"),
        ({"evaluation": b'{"input":"a","target":""}\n'}, "evaluation row 1"),
        ({"virtual_tokens": 500}, "fit beside the virtual tokens"),
        ({"init": "text"}, "no tokens"),
    ],
)
def test_a_request_that_cannot_start_fails_alone(
    make_session: MakeSession, make_request: MakeRequest, fields: dict[str, object], told: str
) -> None:
    session = make_session()
    ended = drive(session, {0: [make_request(1, max_steps=3)], 1: [make_request(2, **fields)]})
    assert ended[1].state is RequestState.COMPLETED
    assert ended[2].state is RequestState.FAILED
    assert told in ended[2].error


def test_what_a_users_rows_make_a_library_say_stays_out_of_the_workers_log(
    make_session: MakeSession,
    make_request: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def trip(*_: object) -> None:
        raise ValueError("cannot encode 'the secret'")

    session = make_session()
    monkeypatch.setattr(engine, "load_dataset", trip)
    ended = drive(session, {0: [make_request(1)]})[1]
    assert ended.state is RequestState.FAILED and "the secret" in ended.error  # its user may know
    assert "request 1 cannot start: ValueError at " in caplog.text
    assert "secret" not in caplog.text


def test_a_request_that_diverges_fails_alone(make_session: MakeSession, make_request: MakeRequest) -> None:
    session = make_session()
    alone = drive(session, {0: [make_request(1, max_steps=20)]})[1]
    session.join(make_request(1, max_steps=20))
    session.join(make_request(2, max_steps=20))
    session.step()
    session._runs[2].state.prompt[0, 0] = float("nan")
    ended = drive(session, {0: []})
    assert ended[2].state is RequestState.FAILED
    assert "became nan at step 2" in ended[2].error
    assert ended[2].files == {}
    assert curve(ended[1])[-1]["loss"] == pytest.approx(curve(alone)[-1]["loss"], abs=1e-5)


def little_memory(limit: int) -> Callable[..., torch.Tensor]:
    """A model that has memory for so many tokens in a pass, as rows by places."""
    real = forward.plain_logits

    def logits(base: Base, prompts: torch.Tensor, pack: forward.Pack) -> torch.Tensor:
        if pack.ids.numel() > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return real(base, prompts, pack)

    return logits


def test_a_step_that_does_not_fit_into_memory_is_split_and_no_step_is_lost(
    make_session: MakeSession, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    joins = {0: [make_request(1, max_steps=8)], 3: [make_request(2, batch_size=20, max_steps=8)]}
    roomy = drive(make_session(), joins)
    monkeypatch.setattr(packing, "plain_logits", little_memory(30))
    narrow = drive(make_session(), joins)
    for i in (1, 2):
        assert narrow[i].state is RequestState.COMPLETED
        assert [point["step"] for point in curve(narrow[i])] == [point["step"] for point in curve(roomy[i])]
        for ours, theirs in zip(curve(narrow[i]), curve(roomy[i]), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert (prompt_of(narrow[i]) - prompt_of(roomy[i])).abs().max().item() < 1e-4


def test_only_a_request_with_a_row_that_does_not_fit_ends_when_memory_runs_out(
    make_session: MakeSession, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "plain_logits", little_memory(30))
    alone = drive(make_session(), {0: [make_request(1, max_steps=8)]})[1]
    long_rows = json_lines([("a " * 30, "b")] * 3)
    joins = {0: [make_request(1, max_steps=8)], 3: [make_request(2, rows=long_rows)]}
    ended = drive(make_session(), joins)
    assert ended[2].state is RequestState.OUT_OF_MEMORY
    assert "a row of 36 tokens" in ended[2].error
    assert [point["step"] for point in curve(ended[1])] == [point["step"] for point in curve(alone)]
    assert curve(ended[1])[-1]["loss"] == pytest.approx(curve(alone)[-1]["loss"], abs=1e-5)


def test_a_row_that_never_fits_is_refused_before_it_joins(
    make_session: MakeSession, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "usable_bytes", lambda _: 100_000.0)
    long_rows = json_lines([("a " * 30, "b")] * 3)
    ended = drive(make_session(), {0: [make_request(1, max_steps=3), make_request(2, rows=long_rows)]})
    assert ended[1].state is RequestState.COMPLETED
    assert (ended[2].state, ended[2].step) == (RequestState.FAILED, 0)
    assert "a row of 36 tokens takes" in ended[2].error


def test_a_request_that_stalls_moves_on_to_a_random_start_once(
    make_session: MakeSession, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_STALL_SHARE", 0.0)  # nothing counts as progress
    settings = {"init": "text", "init_text": "a b", "target_score": 1e-6, "max_steps": 80, "seed": 3}
    expected = drive(make_session(), {0: [make_request(**settings)]})[1]
    report = json.loads(expected.files["prompttuner.json"])
    assert (report["start"], report["restart"]) == ("text", {"step": 30, "start": "random"})
    points = report["curve"]
    assert [point["start"] for point in points] == [0] * 7 + [1] * 10
    assert [point["step"] for point in points] == list(range(0, 81, 5))
    alone = drive(make_session(), {0: [make_request(init="random", max_steps=50, seed=3)]})[1]
    # The rows differ by then; the first evaluation is that of noise that took five steps, not of the old prompt.
    assert abs(points[7]["loss"] - curve(alone)[1]["loss"]) < abs(points[7]["loss"] - points[6]["loss"])
    session = make_session()
    session.join(make_request(**settings))
    for _ in range(47):
        session.step()
    session.give_back()
    resumed = drive(session, {0: [make_request(attempt=2, **settings)]})[1]
    assert curve(resumed) == points
    assert torch.equal(prompt_of(resumed), prompt_of(expected))


def test_a_fault_of_the_worker_itself_is_not_laid_upon_a_request(
    make_session: MakeSession, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> object:
        raise RuntimeError("CUDA error: device-side assert triggered")

    session = make_session()
    session.join(make_request())
    monkeypatch.setattr(engine.packing, "gradient", broken)
    with pytest.raises(RuntimeError, match="device-side"):
        session.step()
    assert session.running() == [Running(request_id=1, attempt=1)]


def test_a_stopped_request_is_forgotten_without_a_word(make_session: MakeSession, make_request: MakeRequest) -> None:
    session = make_session()
    session.join(make_request(1))
    session.join(make_request(2, rows=b""))
    session.stop(1, attempt=2)
    assert session.running() == [Running(request_id=1, attempt=1)]
    session.stop(1, attempt=1)
    session.stop(2, attempt=1)
    session.stop(77, attempt=1)
    assert not session.busy
    assert session.step() == []


def test_a_later_attempt_takes_the_place_of_an_earlier_one(
    make_session: MakeSession, make_request: MakeRequest
) -> None:
    session = make_session()
    session.join(make_request(attempt=2))
    session.join(make_request(attempt=1))
    assert session.running() == [Running(request_id=1, attempt=2)]
    session.join(make_request(attempt=3))
    assert session.running() == [Running(request_id=1, attempt=3)]


def test_what_a_request_learned_starts_the_next_one(make_session: MakeSession, make_request: MakeRequest) -> None:
    session = make_session()
    first, second = (make_request(i, init="bank", seed=i, **EASY) for i in (1, 2))
    ends = drive(session, {0: [first]}) | drive(session, {0: [second]})
    starts = [json.loads(ends[i].files["prompttuner.json"])["start"] for i in (1, 2)]
    assert starts[0] == "random"
    assert starts[1].startswith("bank:")
    assert ends[2].step < ends[1].step < 100


def test_a_published_prompt_is_the_result_and_says_whose_and_how_good_it_is(
    make_session: MakeSession, make_request: MakeRequest, tmp_path: Path
) -> None:
    session = make_session()
    ended = drive(session, {0: [make_request(share="account", job_name="greek", uid=7, user="eve", **EASY)]})[1]
    report = json.loads(ended.files["prompttuner.json"])
    bank = Bank(tmp_path / "bank")
    (entry,) = bank.recent(report["base_digest"], 4, 8, "physics", 8)
    assert (entry.uid, entry.user, entry.account, entry.share) == (7, "eve", "physics", "account")
    assert (entry.loss, entry.score, entry.metric) == (ended.loss, ended.score, "loss")
    assert (entry.steps, entry.start, entry.job_name) == (ended.step, "random", "greek")
    assert np.array_equal(bank.load(entry), prompt_of(ended).numpy())


def test_a_request_that_missed_its_target_starts_no_other(
    make_session: MakeSession, make_request: MakeRequest, tmp_path: Path
) -> None:
    ended = drive(make_session(), {0: [make_request(max_steps=3, target_score=1e-6)]})[1]
    assert ended.state is RequestState.COMPLETED
    assert list(tmp_path.rglob("bank/*")) == []


def test_a_disk_that_refuses_costs_no_request(
    make_session: MakeSession, make_request: MakeRequest, tmp_path: Path
) -> None:
    for name in ("bank", "checkpoints"):
        (tmp_path / name).write_text("a file where a folder should be")
    ended = drive(make_session(checkpoint_s=0.0), {0: [make_request(**EASY)]})[1]
    assert json.loads(ended.files["prompttuner.json"])["target_reached"]  # so it was to be published
    assert ended.state is RequestState.COMPLETED
    assert ended.files


def test_warming_up_trains_for_real_and_leaves_nothing(make_session: MakeSession, tmp_path: Path) -> None:
    session = make_session()
    seconds, profile = session.warm_up()
    assert seconds > 0
    assert profile.base_s + profile.per_request_s > 0
    assert not session.busy
    assert [path.name for path in tmp_path.iterdir()] in ([], ["base_models"])

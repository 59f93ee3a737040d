"""When a request is over, and when it moves on to another start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from broker.protocol.messages import Assign
from tuner.data import BatchOrder, Dataset, Example
from tuner.optimizer import PromptState
from tuner.run import History, Point, Restart, Run

MakeRequest = Callable[..., Assign]


@pytest.fixture
def make_run(make_request: MakeRequest) -> Callable[..., Run]:
    def make(losses: list[float], *, start: str = "bank:abc", rows: int = 20, **fields: Any) -> Run:
        """A run just after the evaluation that gave the last of `losses`."""
        assign = make_request(**({"max_steps": 1000, "target_score": 0.01} | fields))
        spec, row = assign.spec, Example((1, 2), 1)
        state = PromptState.new(torch.ones(4, 8))
        order = BatchOrder(rows, spec.batch_size * spec.accumulate_steps, spec.seed)
        run = Run(assign, Dataset([row] * rows, [row]), order, state, state.prompt, History(start, 0.0))
        for number, loss in enumerate(losses):
            state.step = number * spec.eval_every
            run.record(Point(run.step, loss, 0.0), state.prompt)
        return run

    return make


FLAT = [2.0, 1.0, 0.95, 0.94, 0.93, 0.92, 0.91, 0.905]  # 30 steps without a tenth gained


def test_thirty_steps_that_gain_less_than_a_tenth_are_a_stall(make_run: Callable[..., Run]) -> None:
    assert make_run(FLAT).stalled
    assert not make_run(FLAT[:-1]).stalled
    assert not make_run([*FLAT[:-1], 0.89]).stalled
    assert not make_run([2.0, *[1.0] * 5]).stalled


def test_the_window_has_six_evaluations_and_thirty_steps_at_least(make_run: Callable[..., Run]) -> None:
    flat = [1.0] * 31
    assert not make_run(flat[:30], eval_every=1).stalled
    assert make_run(flat, eval_every=1).stalled
    assert not make_run(flat[:6], eval_every=50).stalled
    assert make_run(flat[:7], eval_every=50).stalled


@pytest.mark.parametrize(
    "fields", [{"start": "random"}, {"target_score": None}, {"rule": "adamw"}, {"target_score": 0.92}]
)
def test_noise_plain_adamw_and_what_has_no_target_or_reached_it_never_move_on(
    make_run: Callable[..., Run], fields: dict[str, Any]
) -> None:
    assert not make_run(FLAT, **fields).stalled


def test_only_an_evaluation_tells_a_stall_and_only_once(make_run: Callable[..., Run]) -> None:
    run = make_run(FLAT)
    run.state.step += 1
    assert not run.stalled
    run = make_run(FLAT)
    run.history.restart = Restart(35, "random")
    run.state.step = 0
    assert run.step == 35
    assert not run.stalled


def test_patience_counts_evaluations_since_the_best_or_the_new_start(make_run: Callable[..., Run]) -> None:
    assert not make_run([2.0, 1.0, 1.5, 1.4], patience=3).over
    run = make_run([2.0, 1.0, 1.5, 1.4, 1.3], patience=3)
    assert run.over
    run.history.restart, run.state.step = Restart(20, "random"), 0
    for loss, over in [(3.0, False), (2.5, False), (2.4, True)]:
        run.state.step += 5
        run.record(Point(run.step, loss, 0.0), run.state.prompt)
        assert run.over is over
    assert [point.start for point in run.history.curve] == [0] * 5 + [1] * 3
    assert not make_run([1.0] * 50, patience=None).over


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, 1000),
        ({"epochs": 3, "batch_size": 8}, 8),
        ({"epochs": 2.5, "batch_size": 5}, 10),
        ({"epochs": 3, "batch_size": 5, "accumulate_steps": 2}, 6),
        ({"epochs": 0.01}, 1),
        ({"epochs": 500, "max_steps": 7}, 7),
    ],
)
def test_epochs_end_a_run_when_each_row_was_seen_that_often_or_at_the_last_step(
    make_run: Callable[..., Run], fields: dict[str, Any], steps: int
) -> None:
    run = make_run([], **fields)
    assert run.steps == steps
    run.state.step = steps - 1
    assert not run.over
    run.state.step = steps
    assert run.over and run.evaluation_due


def test_the_schedule_of_a_new_start_ends_with_the_request(make_run: Callable[..., Run]) -> None:
    run = make_run([], max_steps=100, schedule="linear", warmup_steps=0)
    run.history.restart = Restart(40, "random")
    assert run.rule.rate_at(1) == pytest.approx(run.spec.rate)
    assert run.rule.rate_at(61) == 0.0

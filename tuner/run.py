"""One request in training: its rows, its prompt, and what is known of how it goes. No tensor work here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import Struct

from broker.protocol.messages import Assign, RequestSpec
from broker.protocol.states import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.data import BatchOrder, Dataset
    from tuner.optimizer import PromptState

_CONVERGED_SHARE = 0.8  # without a target: the loss must fall to this share of the first prompt's


class Point(Struct, frozen=True, forbid_unknown_fields=True):
    """One evaluation: after `step` updates, on the evaluation rows."""

    step: int
    loss: float
    accuracy: float

    def score(self, metric: Metric) -> float:
        return self.loss if metric is Metric.LOSS else self.accuracy

    def better_than(self, other: Point | None, metric: Metric) -> bool:
        """By the metric, then by loss; anything beats nothing."""
        if other is None:
            return True
        if metric is Metric.ACCURACY and self.accuracy != other.accuracy:
            return self.accuracy > other.accuracy
        return self.loss < other.loss


class History(Struct, forbid_unknown_fields=True):
    """What a request's next attempt must know besides the tensors."""

    start: str  # "bank:<first of the digest>", "random", "text"
    lookup_s: float
    first_step_unix_s: float = 0.0
    curve: list[Point] = []
    best: Point | None = None


@dataclass(slots=True)
class Run:
    """One attempt at one request."""

    assign: Assign
    data: Dataset
    order: BatchOrder
    state: PromptState
    best_prompt: Tensor  # the first prompt until an evaluation found a better one
    history: History
    told_mono_s: float = -math.inf  # the last progress
    kept_mono_s: float = field(default=-math.inf)  # the last checkpoint

    @property
    def spec(self) -> RequestSpec:
        return self.assign.spec

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def metric(self) -> Metric:
        return self.spec.metric

    @property
    def latest(self) -> Point | None:
        return self.history.curve[-1] if self.history.curve else None

    @property
    def evaluation_due(self) -> bool:
        return self.step % self.spec.eval_every == 0 or self.step >= self.spec.max_steps

    @property
    def step_tokens(self) -> int:
        """How much one step of it asks of the memory: rows by the longest row."""
        rows = min(self.spec.batch_size, len(self.data.train))
        return rows * (self.spec.virtual_tokens + max(map(len, self.data.train)))

    def record(self, point: Point, prompt: Tensor) -> None:
        """Takes one evaluation of `prompt` into the curve, and the prompt if it is the best so far."""
        self.history.curve.append(point)
        if point.better_than(self.history.best, self.metric):
            self.history.best = point
            self.best_prompt = prompt

    @property
    def target_reached(self) -> bool:
        target, best = self.spec.target_score, self.history.best
        return target is not None and best is not None and self.metric.reached(best.score(self.metric), target)

    @property
    def converged(self) -> bool:
        """Whether the tuned prompt is fit to start others: it reached its target; or, without one, became clearly
        better than its first prompt."""
        if self.spec.target_score is not None:
            return self.target_reached
        best, curve = self.history.best, self.history.curve
        return best is not None and best.loss <= _CONVERGED_SHARE * curve[0].loss

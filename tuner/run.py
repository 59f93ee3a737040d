"""One request in training: its rows, its prompt, and what is known of how it goes. No tensor work here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from broker.protocol.messages import Assign
from broker.protocol.spec import RequestSpec
from broker.protocol.states import Metric, Rule

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.data import BatchOrder, Dataset
    from tuner.optimizer import PromptState, StepRule

_STALL_STEPS, _STALL_EVALUATIONS = 30, 6  # both at least: a shorter window takes slow starts for stalled ones
_STALL_SHARE = 0.9  # of the best loss before the window: what the window must reach
_CONVERGED_SHARE = 0.8  # without a target: the loss must fall to this share of the first prompt's


class Point(Struct, frozen=True, forbid_unknown_fields=True):
    """One evaluation: after `step` updates, on the evaluation rows."""

    step: int
    loss: float
    accuracy: float
    start: int = 0  # which of the request's first prompts it comes from
    token_accuracy: float = 0.0
    label_accuracy: float | None = None  # taken only where it is the metric: it costs a pass for each label

    def score(self, metric: Metric) -> float:
        match metric:
            case Metric.LOSS:
                return self.loss
            case Metric.ACCURACY:
                return self.accuracy
            case Metric.TOKEN_ACCURACY:
                return self.token_accuracy
            case Metric.LABEL_ACCURACY:
                return self.label_accuracy or 0.0

    def better_than(self, other: Point | None, metric: Metric) -> bool:
        """By the metric, then by loss; anything beats nothing."""
        if other is None:
            return True
        if metric is not Metric.LOSS and self.score(metric) != other.score(metric):
            return self.score(metric) > other.score(metric)
        return self.loss < other.loss


class Restart(Struct, frozen=True, forbid_unknown_fields=True):
    """A request that stalled moved on to another first prompt."""

    step: int
    start: str


class History(Struct, forbid_unknown_fields=True):
    """What a request's next attempt must know besides the tensors."""

    start: str  # "bank:<first of the digest>", "random", "text"
    lookup_s: float
    first_step_unix_s: float = 0.0
    curve: list[Point] = []
    best: Point | None = None
    restart: Restart | None = None


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
        """Updates so far, those of a first prompt that was given up included."""
        return self._restart_step + self.state.step

    @property
    def steps(self) -> int:
        """How many updates it gets at most."""
        epochs, rows = self.spec.epochs, len(self.data.train)
        if epochs is None:
            return self.spec.max_steps
        return min(self.spec.max_steps, max(1, math.ceil(epochs * rows / self.order.batch_size)))

    @property
    def rule(self) -> StepRule:
        from tuner.optimizer import StepRule

        return StepRule.of(self.spec, self.steps - self._restart_step)

    @property
    def metric(self) -> Metric:
        return self.spec.metric

    @property
    def latest(self) -> Point | None:
        return self.history.curve[-1] if self.history.curve else None

    @property
    def evaluation_due(self) -> bool:
        return self.step % self.spec.eval_every == 0 or self.step >= self.steps

    @property
    def longest_row(self) -> int:
        """The tokens of its longest row, virtual ones included: what cannot be split."""
        return self.spec.virtual_tokens + self.data.longest

    def record(self, point: Point, prompt: Tensor) -> None:
        """Takes one evaluation of `prompt` into the curve, and the prompt if it is the best so far."""
        point = replace(point, start=0 if self.history.restart is None else 1)
        self.history.curve.append(point)
        if point.better_than(self.history.best, self.metric):
            self.history.best = point
            self.best_prompt = prompt

    @property
    def target_reached(self) -> bool:
        target, best = self.spec.target_score, self.history.best
        return target is not None and best is not None and self.metric.reached(best.score(self.metric), target)

    @property
    def over(self) -> bool:
        """Whether there is nothing more to do: target reached, no more steps, or no more patience."""
        return self.target_reached or self.step >= self.steps or self._out_of_patience

    @property
    def stalled(self) -> bool:
        """Whether it should move on to another first prompt, just after an evaluation: it has a target and is not
        getting nearer. Noise takes the place of a prompt that means something already; nothing takes the place of
        noise, which does not pay, or of plain AdamW, which does as it is told."""
        spec, history = self.spec, self.history
        if spec.target_score is None or self.target_reached or spec.rule is not Rule.SCALED:
            return False
        if history.restart is not None or history.start == "random" or history.curve[-1].step != self.step:
            return False
        window = max(_STALL_EVALUATIONS, math.ceil(_STALL_STEPS / spec.eval_every))
        losses = [point.loss for point in history.curve]
        return len(losses) > window and min(losses[-window:]) > _STALL_SHARE * min(losses[:-window])

    @property
    def _restart_step(self) -> int:
        return 0 if self.history.restart is None else self.history.restart.step

    @property
    def _out_of_patience(self) -> bool:
        history = self.history
        if self.spec.patience is None or history.best is None:
            return False
        since_best = len(history.curve) - 1 - history.curve.index(history.best)
        since_start = sum(point.start == history.curve[-1].start for point in history.curve)
        return min(since_best, since_start) >= self.spec.patience

    @property
    def converged(self) -> bool:
        """Whether the tuned prompt is fit to start others: it reached its target; or, without one, became clearly
        better than its first prompt."""
        if self.spec.target_score is not None:
            return self.target_reached
        best, curve = self.history.best, self.history.curve
        return best is not None and best.loss <= _CONVERGED_SHARE * curve[0].loss

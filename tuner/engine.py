"""The tensor work of a session: opens requests, trains them together, evaluates them, measures itself."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bank.store import Bank
from broker.protocol.errors import DataError
from broker.protocol.messages import Assign, Profile
from broker.protocol.spec import RequestSpec
from broker.protocol.states import Init
from tuner import packing, result
from tuner.checkpoint import Checkpoints
from tuner.data import BatchOrder, Dataset, Example, load_dataset, spec_digest
from tuner.labels import choices_of, chosen_right
from tuner.memory import Budget, bytes_per_request, usable_bytes
from tuner.model import Base
from tuner.optimizer import PromptState, update
from tuner.run import History, Point, Restart, Run
from tuner.start import first_prompt, random_prompt
from tuner.ways import known_fastest

_log = logging.getLogger(__name__)

_PROFILED_REQUESTS = 4
_SLOW_STEP_S = 1.0
_TRIALS = 3
_LABELLED_ROWS = 64  # judged with every label at a time: bounds what the host holds


class Engine:
    """All that a session does with tensors. A step that does not fit into memory is split, to single rows if need be.
    Any call may raise an out-of-memory error all the same; then nothing has changed."""

    def __init__(self, base: Base, bank: Bank, checkpoints: Checkpoints, kept: Path | None = None) -> None:
        """`kept` is a private folder for what other processes need not find out again."""
        self._base = known_fastest(base, kept)
        self._budget = Budget.of(self._base)
        _log.info("%s: %s, at most %d tokens a pass", base.path, self._base.ways.words, self._budget.max_tokens)
        self._bank = bank
        self._checkpoints = checkpoints

    def open(self, assign: Assign) -> Run:
        """The request, ready for its next step: from its checkpoint, or from a first prompt.

        Raises `DataError` for rows or settings that cannot be used."""
        base, spec = self._base, assign.spec
        data = load_dataset(base, spec, assign.train, assign.eval)
        self._check_room(data, spec.virtual_tokens)
        order = BatchOrder(len(data.train), spec.batch_size * spec.accumulate_steps, spec.seed)
        kept = self._checkpoints.load(assign.request_id, spec_digest(spec, base.digest), base, spec.virtual_tokens)
        if kept is not None:
            return Run(assign, data, order, kept.state, kept.best_prompt, kept.history)
        start = first_prompt(base, self._bank, assign, data.train, self._budget.max_tokens)
        history = History(start=start.name, lookup_s=start.lookup_s)
        return Run(assign, data, order, PromptState.new(start.prompt), start.prompt, history)

    def train(self, runs: Sequence[Run]) -> list[str]:
        """One optimizer step of every run; for each, what went wrong with it alone, or "" ."""
        states = [run.state for run in runs]
        prompts, lengths = [state.prompt for state in states], [len(state.prompt) for state in states]
        rows = [(i, run.data.train[row]) for i, run in enumerate(runs) for row in run.order.batch(run.step)]
        losses, slope = self._budget.within(
            lambda most: packing.gradient(self._base, prompts, rows, most),
            lambda most: packing.plan(self._base, lengths, rows, most).splittable,
        )
        update(states, [run.rule for run in runs], slope, self._base.embedding_rms)
        found = torch.stack([losses, _finite(slope, lengths)]).tolist()  # one wait for the device
        return [_fault(run, loss, bool(finite)) for run, loss, finite in zip(runs, *found, strict=True)]

    def evaluate(self, tasks: Sequence[tuple[Run, Tensor, int]]) -> list[Run]:
        """Evaluates each (run, prompt, step) and records it in the run; returns the runs whose loss is not finite."""
        scored = [(prompt, run.data.eval) for run, prompt, _ in tasks]
        lengths = [len(prompt) for prompt, _ in scored]
        rows = [(i, example) for i, (_, examples) in enumerate(scored) for example in examples]
        scores = self._budget.within(
            lambda most: packing.score(self._base, scored, most),
            lambda most: packing.plan(self._base, lengths, rows, min(most, packing.SCORED_TOKENS)).splittable,
        )
        # All is computed before any is recorded: memory may run out in the last.
        labelled = [self._label_accuracy(prompt, run.data) for run, prompt, _ in tasks]
        broken = []
        for (run, prompt, step), found, label_accuracy in zip(tasks, scores, labelled, strict=True):
            if math.isfinite(found.loss):
                point = Point(step, found.loss, found.accuracy, 0, found.token_accuracy, label_accuracy)
                run.record(point, prompt)
            else:
                broken.append(run)
        return broken

    def _label_accuracy(self, prompt: Tensor, data: Dataset) -> float | None:
        if not data.labels:
            return None
        right = 0
        for first in range(0, len(data.eval), _LABELLED_ROWS):
            rows = data.eval[first : first + _LABELLED_ROWS]
            losses = self._row_losses(prompt, choices_of(rows, data.labels))
            right += chosen_right(rows, data.labels, losses)
        return right / len(data.eval)

    def _row_losses(self, prompt: Tensor, examples: list[Example]) -> NDArray[np.float64]:
        rows = [(0, example) for example in examples]
        (judged,) = self._budget.within(
            lambda most: packing.judge(self._base, [(prompt, examples)], most),
            lambda most: packing.plan(self._base, [len(prompt)], rows, min(most, packing.SCORED_TOKENS)).splittable,
        )
        return judged.loss

    def move_on(self, run: Run) -> None:
        """Lets a run that stalled begin anew from noise; its best prompt so far stays."""
        spec = run.spec
        _log.info("request %d stalls at step %d and moves on to a random start", run.assign.request_id, run.step)
        run.history.restart = Restart(run.step, "random")
        run.state = PromptState.new(random_prompt(self._base, spec.virtual_tokens, spec.seed))

    def keep(self, run: Run) -> None:
        """Writes the run's checkpoint. A disk that refuses costs at most the steps since the last one: it is logged."""
        try:
            self._checkpoints.save(run, spec_digest(run.spec, self._base.digest))
        except OSError as error:
            _log.warning("request %d: no checkpoint: %s", run.assign.request_id, error)

    def forget(self, request_id: int, attempt: int) -> None:
        """Removes the request's checkpoint."""
        try:
            self._checkpoints.remove(request_id, attempt)
        except OSError as error:
            _log.warning("request %d: its checkpoint stays: %s", request_id, error)

    def finish(self, run: Run) -> dict[str, bytes]:
        """The result files of the best prompt, which also goes into the bank if it is fit to start others."""
        if run.converged:
            try:
                self._bank.publish(run.best_prompt.cpu().numpy(), result.bank_entry(self._base, run))
            except (OSError, ValueError) as error:
                _log.warning("request %d: not published: %s", run.assign.request_id, error)
        return result.result_files(self._base, run)

    def measure(self) -> Profile:
        """Trains and evaluates made-up requests; the seconds of a step with its share of an evaluation.

        The first, slow calls of every kind happen here and not in a user's first step."""
        one = self._seconds(1)
        # Where a single step fills the device, sharing it saves nothing, and to measure that would hold up readiness.
        several = self._seconds(_PROFILED_REQUESTS) if one < _SLOW_STEP_S else _PROFILED_REQUESTS * one
        per_request_s = max(0.0, (several - one) / (_PROFILED_REQUESTS - 1))
        virtual_tokens = self._made_up(0).spec.virtual_tokens
        return Profile(
            base_s=max(0.0, one - per_request_s),
            per_request_s=per_request_s,
            bytes_per_token=self._budget.bytes_per_token,
            bytes_per_request=bytes_per_request(self._base, virtual_tokens),
        )

    def _check_room(self, data: Dataset, virtual_tokens: int) -> None:
        """Raises `DataError` when the longest row by itself does not fit into memory: no splitting helps there."""
        longest = virtual_tokens + data.longest
        needed, free = self._budget.row_bytes(longest), usable_bytes(self._base.device)
        if needed > free:
            raise DataError(
                f"a row of {longest} tokens takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
                "shorten the row",
            )

    def _seconds(self, requests: int) -> float:
        runs = [self._made_up(seed) for seed in range(requests)]
        train_s = _fastest(lambda: self.train(runs))
        evaluate_s = _fastest(lambda: self.evaluate([(run, run.state.prompt, run.step) for run in runs]))
        return train_s + evaluate_s / runs[0].spec.eval_every

    def _made_up(self, seed: int) -> Run:
        virtual_tokens = max(1, min(16, self._base.positions // 4))
        length = max(2, min(32, self._base.positions // 2))
        tokens = np.random.default_rng(seed).integers(0, len(self._base.tokenizer), (32, length)).tolist()
        examples = [Example(tuple(row), length // 2) for row in tokens]
        spec = RequestSpec(model="warm-up", train="0" * 64, virtual_tokens=virtual_tokens, init=Init.RANDOM, seed=seed)
        assign = Assign(
            request_id=1, attempt=1, user="", uid=0, account="", spec=spec, train=b"", eval=None
        )  # never seen outside: no message is made of it
        prompt = random_prompt(self._base, virtual_tokens, seed)
        order = BatchOrder(len(examples), spec.batch_size, seed)
        return Run(assign, Dataset(examples, examples), order, PromptState.new(prompt), prompt, History("random", 0.0))


def _finite(slope: Tensor, lengths: list[int]) -> Tensor:
    """Of each prompt, whether its gradient is."""
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(slope.device)
    bad = (~torch.isfinite(slope).all(dim=1)).float()
    return torch.zeros(len(lengths), device=slope.device).index_add_(0, owner, bad) == 0


def _fault(run: Run, loss: float, finite: bool) -> str:
    if math.isfinite(loss) and finite:
        return ""
    what = f"the training loss became {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    return f"{what} at step {run.step}: lower the rate (it was {run.spec.rate:g})"


def _fastest(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(_TRIALS):
        began_mono_s = time.monotonic()
        call()
        taken.append(time.monotonic() - began_mono_s)
        if taken[-1] > _SLOW_STEP_S:
            break  # the first call's extra cost does not matter then
    return min(taken)

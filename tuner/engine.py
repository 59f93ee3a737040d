"""The tensor work of a session: opens requests, trains them together, evaluates them, measures itself."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bank.store import Bank
from broker.protocol.messages import Assign, Profile, RequestSpec
from broker.protocol.states import Init
from tuner import packing, result
from tuner.checkpoint import Checkpoints
from tuner.data import BatchOrder, Dataset, Example, load_dataset, spec_digest
from tuner.model import Base
from tuner.optimizer import PromptState, update
from tuner.run import History, Point, Run
from tuner.start import first_prompt, random_prompt

_log = logging.getLogger(__name__)

_ALLOCATOR_WORDS = ("can't allocate memory", "out of memory", "not enough memory")
_PROFILED_REQUESTS = 4
_TRIALS = 3


class Engine:
    """All that a session does with tensors. Any call may raise an out-of-memory error (`is_out_of_memory` knows them);
    then nothing has changed."""

    def __init__(self, base: Base, bank: Bank, checkpoints: Checkpoints) -> None:
        self._base = base
        self._bank = bank
        self._checkpoints = checkpoints

    def open(self, assign: Assign) -> Run:
        """The request, ready for its next step: from its checkpoint, or from a first prompt.

        Raises `DataError` for rows or settings that cannot be used."""
        base, spec = self._base, assign.spec
        data = load_dataset(base, spec, assign.train, assign.eval)
        order = BatchOrder(len(data.train), spec.batch_size, spec.seed)
        kept = self._checkpoints.load(assign.request_id, spec_digest(spec, base.digest), base, spec.virtual_tokens)
        if kept is not None:
            return Run(assign, data, order, kept.state, kept.best_prompt, kept.history)
        start = first_prompt(base, self._bank, assign, data.train)
        history = History(start=start.name, lookup_s=start.lookup_s)
        return Run(assign, data, order, PromptState.new(start.prompt), start.prompt, history)

    def train(self, runs: Sequence[Run]) -> list[str]:
        """One optimizer step of every run; for each, what went wrong with it alone, or "" ."""
        states = [run.state for run in runs]
        lengths = [len(state.prompt) for state in states]
        rows = [(i, run.data.train[row]) for i, run in enumerate(runs) for row in run.order.batch(run.step)]
        pack = packing.collate(rows, lengths, self._base.device)
        losses, slope = packing.gradient(self._base, torch.cat([state.prompt for state in states]), pack)
        update(states, [run.spec.rate for run in runs], slope, self._base.embedding_rms)
        return [_fault(*values) for values in zip(runs, losses.tolist(), _finite(slope, lengths), strict=True)]

    def evaluate(self, tasks: Sequence[tuple[Run, Tensor, int]]) -> list[Run]:
        """Evaluates each (run, prompt, step) and records it in the run; returns the runs whose loss is not finite."""
        scores = packing.score(self._base, [(prompt, run.data.eval) for run, prompt, _ in tasks])
        broken = []
        for (run, prompt, step), found in zip(tasks, scores, strict=True):
            if math.isfinite(found.loss):
                run.record(Point(step, found.loss, found.accuracy), prompt)
            else:
                broken.append(run)
        return broken

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
        several = self._seconds(_PROFILED_REQUESTS)
        per_request_s = max(0.0, (several - one) / (_PROFILED_REQUESTS - 1))
        return Profile(base_s=max(0.0, one - per_request_s), per_request_s=per_request_s)

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATOR_WORDS)


def release_memory() -> None:
    """Gives cached GPU memory back after an allocation failed."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _finite(slope: Tensor, lengths: list[int]) -> list[bool]:
    rows: list[bool] = torch.isfinite(slope).all(dim=1).tolist()
    ends = np.cumsum(lengths).tolist()
    return [all(rows[end - length : end]) for length, end in zip(lengths, ends, strict=True)]


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
    return min(taken)

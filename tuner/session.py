"""One warm base model and the requests that train on it: what a trainer process drives.

The session decides (who joins, what is due, what ends and what is said); the engine computes. Importing this module is
quick: torch and transformers come in with `load()`.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from broker.protocol.errors import PromptTunerError
from broker.protocol.messages import Assign, Ended, Profile, Progress, Running
from broker.protocol.states import RequestState
from tuner.model import load_base
from tuner.run import Run

if TYPE_CHECKING:
    from tuner.engine import Engine

_log = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 1.0
_RECENT = 0.2  # weight of the newest step in the recent step time


class Session:
    """Loads one base model once; requests join and leave between steps. Not thread-safe: one thread drives it.

    `slots` is how many requests the broker means to send; the session itself takes any number."""

    def __init__(
        self, *, model_path: str, bank_dir: Path, checkpoint_dir: Path, checkpoint_s: float, slots: int
    ) -> None:
        self._model_path = model_path
        self._bank_dir = bank_dir
        self._checkpoint_dir = checkpoint_dir
        self._checkpoint_s = checkpoint_s
        self._slots = slots
        self._loaded: Engine | None = None
        self._runs: dict[int, Run] = {}  # by request id
        self._ended: list[Progress | Ended] = []  # to be said by the next step
        self._step_s = 0.0  # recent seconds of a step, all that is due after it included

    def load(self) -> dict[str, float]:
        """Imports the libraries and loads the base; the seconds of each phase: "imports", "read", "to_device".

        Raises `ConfigError` for a directory that holds no usable causal language model."""
        base, phases_s = load_base(self._model_path)
        from bank.store import Bank
        from tuner.checkpoint import Checkpoints
        from tuner.engine import Engine

        self._loaded = Engine(base, Bank(self._bank_dir), Checkpoints(self._checkpoint_dir))
        return phases_s

    def warm_up(self) -> tuple[float, Profile]:
        """Runs real training steps on made-up rows; the seconds taken and the measured cost of a step."""
        began_mono_s = time.monotonic()
        profile = self._engine.measure()
        self._step_s = profile.base_s + profile.per_request_s
        return time.monotonic() - began_mono_s, profile

    def join(self, assign: Assign) -> None:
        """Takes one request into the next step, from its checkpoint if there is one. Its own faults never raise: such a
        request ends in the next `step()`."""
        held = self._runs.get(assign.request_id)
        if held is not None and held.assign.attempt >= assign.attempt:
            return
        self._runs.pop(assign.request_id, None)
        try:
            run = self._engine.open(assign)
        except PromptTunerError as error:
            self._ended.append(_end(assign, RequestState.FAILED, error=str(error)))
        # Whatever one user's rows make a library do, the others on this worker go on.
        except Exception as error:
            state = RequestState.OUT_OF_MEMORY if self._out_of_memory(error) else RequestState.FAILED
            # Not the error's words, which may quote the user's rows.
            _log.error("request %d cannot start: %s at %s", assign.request_id, type(error).__name__, _place(error))
            self._ended.append(_end(assign, state, error=f"cannot start: {type(error).__name__}: {error}"))
        else:
            run.kept_mono_s = time.monotonic()
            self._runs[assign.request_id] = run

    def stop(self, request_id: int, attempt: int) -> None:
        """Forgets the attempt without a word; an unknown one is no error. Its checkpoint stays: another attempt may be
        using it."""
        run = self._runs.get(request_id)
        if run is not None and run.assign.attempt == attempt:
            del self._runs[request_id]
        self._ended = [said for said in self._ended if (said.request_id, said.attempt) != (request_id, attempt)]

    @property
    def busy(self) -> bool:
        """Whether `step()` has anything to do."""
        return bool(self._runs or self._ended)

    def running(self) -> list[Running]:
        """The attempts that train now."""
        return [_key(run) for run in self._runs.values()]

    def step(self) -> list[Progress | Ended]:
        """One packed optimizer step of all requests, with what is due after it: evaluations, checkpoints, ends.

        Every message carries epoch 0. A request of which not even a single row fits into memory ends; the others lose
        no step."""
        said, self._ended = self._ended, []
        if not self._runs:
            return said
        began_mono_s = time.monotonic()
        said += self._within_memory(self._train)
        said += self._within_memory(self._evaluate)
        self._note_duration(time.monotonic() - began_mono_s)
        for run in list(self._runs.values()):
            said += self._after_step(run)
        return said

    def give_back(self) -> list[Running]:
        """Checkpoints every running request and forgets them all: another worker goes on from there."""
        given = self.running()
        for run in self._runs.values():
            self._engine.keep(run)
        self._runs.clear()
        return given

    @property
    def _engine(self) -> Engine:
        if self._loaded is None:
            raise RuntimeError("load() comes first")
        return self._loaded

    def _within_memory(self, work: Callable[[Sequence[Run]], list[Ended]]) -> list[Ended]:
        """What `work` says of the running requests; as long as single rows do not fit into memory, the request with the
        longest one ends."""
        ended: list[Ended] = []
        while self._runs:
            try:
                return ended + work(list(self._runs.values()))
            except (RuntimeError, MemoryError) as error:
                if not self._out_of_memory(error):
                    raise
                ended.append(self._end_largest(error))
        return ended

    def _train(self, runs: Sequence[Run]) -> list[Ended]:
        faults = self._engine.train(runs)
        now_unix_s = time.time()
        for run in runs:
            run.history.first_step_unix_s = run.history.first_step_unix_s or now_unix_s
        return [self._end_failed(run, fault) for run, fault in zip(runs, faults, strict=True) if fault]

    def _evaluate(self, runs: Sequence[Run]) -> list[Ended]:
        # The first prompt is evaluated behind the first step, not before it: training starts sooner.
        tasks = [(run, run.best_prompt, 0) for run in runs if not run.history.curve]
        tasks += [(run, run.state.prompt, run.step) for run in runs if run.evaluation_due]
        if not tasks:
            return []
        broken = self._engine.evaluate(tasks)
        unique = {id(run): run for run in broken}.values()
        return [self._end_failed(run, f"the evaluation loss is not finite at step {run.step}") for run in unique]

    def _after_step(self, run: Run) -> list[Progress | Ended]:
        if run.over:
            # A request may be done with its first step: its start is always told.
            return [self._progress(run), self._end_completed(run)]
        if run.stalled:
            self._engine.move_on(run)
        now_mono_s = time.monotonic()
        if now_mono_s - run.kept_mono_s >= self._checkpoint_s:
            self._engine.keep(run)
            run.kept_mono_s = now_mono_s
        if run.evaluation_due or now_mono_s - run.told_mono_s >= _PROGRESS_EVERY_S:
            run.told_mono_s = now_mono_s
            return [self._progress(run)]
        return []

    def _progress(self, run: Run) -> Progress:
        latest = run.latest
        return Progress(
            epoch=0,
            request_id=run.assign.request_id,
            attempt=run.assign.attempt,
            step=run.step,
            loss=latest.loss if latest else None,
            score=latest.score(run.metric) if latest else None,
            remaining_s=(run.steps - run.step) * self._step_s,
            start=run.history.start,
            lookup_s=run.history.lookup_s,
            first_step_unix_s=run.history.first_step_unix_s,
        )

    def _end_completed(self, run: Run) -> Ended:
        best = run.history.best
        files = self._engine.finish(run)
        self._drop(run)
        loss, score = (best.loss, best.score(run.metric)) if best else (None, None)
        return _end(run.assign, RequestState.COMPLETED, step=run.step, loss=loss, score=score, files=files)

    def _end_failed(self, run: Run, error: str) -> Ended:
        self._drop(run)
        return _end(run.assign, RequestState.FAILED, step=run.step, error=error)

    def _end_largest(self, error: BaseException) -> Ended:
        largest = max(self._runs.values(), key=lambda run: run.longest_row)
        self._drop(largest)
        message = f"out of memory in a row of {largest.longest_row} tokens: use shorter rows or fewer virtual tokens"
        _log.warning("request %d: %s: %s", largest.assign.request_id, message, error)
        return _end(largest.assign, RequestState.OUT_OF_MEMORY, step=largest.step, error=message)

    def _drop(self, run: Run) -> None:
        del self._runs[run.assign.request_id]
        self._engine.forget(run.assign.request_id, run.assign.attempt)

    def _out_of_memory(self, error: BaseException) -> bool:
        from tuner.memory import is_out_of_memory, release_memory

        if not is_out_of_memory(error):
            return False
        release_memory()
        return True

    def _note_duration(self, taken_s: float) -> None:
        self._step_s = taken_s if not self._step_s else (1 - _RECENT) * self._step_s + _RECENT * taken_s


def _place(error: BaseException) -> str:
    """Where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def _key(run: Run) -> Running:
    return Running(request_id=run.assign.request_id, attempt=run.assign.attempt)


def _end(
    assign: Assign,
    state: RequestState,
    *,
    step: int = 0,
    loss: float | None = None,
    score: float | None = None,
    error: str = "",
    files: dict[str, bytes] | None = None,
) -> Ended:
    return Ended(
        epoch=0,
        request_id=assign.request_id,
        attempt=assign.attempt,
        state=state,
        step=step,
        loss=loss,
        score=score,
        error=error,
        files=files or {},
    )

"""One warm base model and the requests that train on it: what a trainer process drives.

The session decides (who joins, what is due, what ends and what is said); the engine computes. Importing this module is
quick: torch and transformers come in with `load()`.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from broker.protocol.errors import PromptTunerError
from broker.protocol.messages import Assign, Ended, Profile, Progress, Running
from broker.protocol.states import RequestState
from tuner.model import Base, load_base
from tuner.residents import Residents, room_bytes
from tuner.run import Run

if TYPE_CHECKING:
    from tuner.engine import Engine

_log = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 1.0
_LOAD_POLL_S = 0.05
_RESIDENCE_S = 5.0  # of a model on the device, before another one with requests takes its place
_RECENT = 0.2  # weight of the newest step in the recent step time


class Session:
    """Loads base models once each; requests join and leave between steps. Not thread-safe: one thread drives it.

    `slots` is how many requests the broker means to send; the session itself takes any number. A request whose model is
    one of `more_models` (name -> directory) trains on that one, which is loaded when the first such request comes;
    every other request trains on the model in `model_path`."""

    def __init__(
        self,
        *,
        model_path: str,
        bank_dir: Path,
        checkpoint_dir: Path,
        checkpoint_s: float,
        slots: int,
        model: str = "",
        more_models: Mapping[str, str] | None = None,
    ) -> None:
        self._model = model
        self._residents = Residents({**(more_models or {}), model: model_path}, self._load_base, room_bytes)
        self._more_models = frozenset(more_models or ()) - {model}
        self._current = model
        self._since_mono_s = 0.0  # when the current one became that
        self._bank_dir = bank_dir
        self._checkpoint_dir = checkpoint_dir
        self._checkpoint_s = checkpoint_s
        self._slots = slots
        self._engines: dict[str, Engine] = {}  # by model
        self._runs: dict[int, Run] = {}  # by request id
        self._waiting: dict[int, Assign] = {}  # for their models
        self._ended: list[Progress | Ended] = []  # to be said by the next step
        self._step_s: dict[str, float] = {}  # by model: recent seconds of a step, all that is due after it included

    def load(self) -> dict[str, float]:
        """Imports the libraries and loads the base; the seconds of each phase: "imports", "read", "to_device".

        Raises `ConfigError` for a directory that holds no usable causal language model."""
        resident = self._residents.load(self._model)
        self._engines[self._model] = self._new_engine(resident.base)
        return resident.phases_s

    def warm_up(self) -> tuple[float, Profile]:
        """Runs real training steps on made-up rows; the seconds taken and the measured cost of a step."""
        began_mono_s = time.monotonic()
        profile = self._engine.measure()
        self._step_s[self._current] = profile.base_s + profile.per_request_s
        return time.monotonic() - began_mono_s, profile

    def first_step(self) -> float:
        """Trains a made-up request of one short row on the current model for one step; the seconds taken."""
        began_mono_s = time.monotonic()
        from tuner.made_up import made_up_run

        self._engine.train([made_up_run(self._residents[self._current].base)])
        return time.monotonic() - began_mono_s

    def begin_load(self, model: str) -> None:
        """Begins to load one of `more_models` beside training. Raises `ConfigError` for another name."""
        self._residents.begin(model)

    @property
    def resident_models(self) -> list[str]:
        """The loaded models, the last used one first."""
        return self._residents.names

    def phases_s(self, model: str) -> dict[str, float]:
        """The seconds of each phase of a resident model's load ("imports", "read", "to_device") and last "swap"."""
        return self._residents[model].phases_s

    def take_loaded(self) -> bool:
        """Takes in the models that have been loaded meanwhile; whether no load is under way any more."""
        for model in self._residents.pending:
            waiting = [assign for assign in self._waiting.values() if self._model_of(assign) == model]
            try:
                if not self._residents.ready(model):
                    continue
            # Whatever a second model's files make a library do, those who train on another go on.
            except Exception as error:
                _log.exception("cannot load model %s", model)
                for assign in waiting:
                    del self._waiting[assign.request_id]
                    self._ended.append(_end(assign, RequestState.FAILED, error=str(error)))
            else:
                self._engines[model] = self._new_engine(self._residents[model].base)
        return not self._residents.pending

    def withdraw(self, model: str) -> None:
        """Takes a resident model off the device: it stays on the host."""
        self._residents.withdraw(model)

    def swap(self, model: str) -> float:
        """Makes a resident model the current one, on its device; the seconds taken."""
        began_mono_s = time.monotonic()
        base = self._residents.use(model)
        if model not in self._engines:
            self._engines[model] = self._new_engine(base)
        if model != self._current:
            self._current, self._since_mono_s = model, time.monotonic()
        return time.monotonic() - began_mono_s

    def join(self, assign: Assign) -> None:
        """Takes one request into the next step, from its checkpoint if there is one. Its own faults never raise: such a
        request ends in the next `step()`."""
        held = self._runs.get(assign.request_id)
        if held is not None and held.assign.attempt >= assign.attempt:
            return
        self._runs.pop(assign.request_id, None)
        self._waiting.pop(assign.request_id, None)
        model = self._model_of(assign)
        if model in self._engines and self._residents.placed(model):
            self._open(assign)
            return
        self._residents.begin(model)
        self._waiting[assign.request_id] = assign

    def _open(self, assign: Assign) -> None:
        try:
            run = self._engines[self._model_of(assign)].open(assign)
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
        waiting = self._waiting.get(request_id)
        if waiting is not None and waiting.attempt == attempt:
            del self._waiting[request_id]
        self._ended = [said for said in self._ended if (said.request_id, said.attempt) != (request_id, attempt)]

    @property
    def busy(self) -> bool:
        """Whether `step()` has anything to do."""
        return bool(self._runs or self._ended or self._waiting or self._residents.pending)

    def running(self) -> list[Running]:
        """The attempts that train now, or wait for their models."""
        return [_key(assign) for assign in (*(run.assign for run in self._runs.values()), *self._waiting.values())]

    def step(self) -> list[Progress | Ended]:
        """One packed optimizer step of the requests of one model, with what is due after it: evaluations, checkpoints,
        ends.

        Every message carries epoch 0. A request of which not even a single row fits into memory ends; the others lose
        no step."""
        if not self._runs and not self._ended:
            self._residents.wait(_LOAD_POLL_S)
        self.take_loaded()
        self._choose_model()
        said, self._ended = self._ended, []
        if not self._current_runs():
            return said
        began_mono_s = time.monotonic()
        said += self._within_memory(self._train)
        said += self._within_memory(self._evaluate)
        self._note_duration(time.monotonic() - began_mono_s)
        for run in self._current_runs():
            said += self._after_step(run)
        return said

    def give_back(self) -> list[Running]:
        """Checkpoints every running request and forgets them all: another worker goes on from there."""
        given = self.running()
        for run in self._runs.values():
            self._engines[self._model_of(run.assign)].keep(run)
        self._runs.clear()
        self._waiting.clear()
        return given

    @property
    def _engine(self) -> Engine:
        if not self._engines:
            raise RuntimeError("load() comes first")
        return self._engines[self._current]

    def _new_engine(self, base: Base) -> Engine:
        from bank.store import Bank
        from tuner.checkpoint import Checkpoints
        from tuner.engine import Engine

        return Engine(base, Bank(self._bank_dir), Checkpoints(self._checkpoint_dir), self._kept)

    def _load_base(self, path: str, beside_training: bool) -> tuple[Base, dict[str, float]]:
        return load_base(path, self._kept, beside_training=beside_training)

    @property
    def _kept(self) -> Path:
        return self._checkpoint_dir.parent / "base_models"

    def _model_of(self, assign: Assign) -> str:
        return assign.spec.model if assign.spec.model in self._more_models else self._model

    def _current_runs(self) -> list[Run]:
        return [run for run in self._runs.values() if self._model_of(run.assign) == self._current]

    def _choose_model(self) -> None:
        """The models that have requests take turns: by steps where all are on the device; else each stays for a while,
        so that training takes most of the time and swaps little."""
        assigns = (*(run.assign for run in self._runs.values()), *self._waiting.values())
        wanted = {self._model_of(assign) for assign in assigns} & self._engines.keys()
        if not wanted:
            return
        stays = self._current in wanted and time.monotonic() - self._since_mono_s < _RESIDENCE_S
        if not stays or all(map(self._residents.placed, wanted)):
            self.swap(next(model for model in reversed(self._residents.names) if model in wanted))
        for assign in [one for one in self._waiting.values() if self._model_of(one) == self._current]:
            del self._waiting[assign.request_id]
            self._open(assign)

    def _within_memory(self, work: Callable[[Sequence[Run]], list[Ended]]) -> list[Ended]:
        """What `work` says of the running requests; as long as single rows do not fit into memory, the request with the
        longest one ends."""
        ended: list[Ended] = []
        while runs := self._current_runs():
            try:
                return ended + work(runs)
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
            remaining_s=(run.steps - run.step) * self._step_s.get(self._current, 0.0),
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
        largest = max(self._current_runs(), key=lambda run: run.longest_row)
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
        before_s = self._step_s.get(self._current) or taken_s
        self._step_s[self._current] = (1 - _RECENT) * before_s + _RECENT * taken_s


def _place(error: BaseException) -> str:
    """Where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def _key(assign: Assign) -> Running:
    return Running(request_id=assign.request_id, attempt=assign.attempt)


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

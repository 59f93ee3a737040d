"""What a worker's supervisor does about each message, timer and signal. Pure: no sockets, no processes, no clock.

Every public method returns the actions for the shell (`tuner.supervisor`) to carry out, in order. `now_s` is monotonic.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from broker.protocol.config import WorkerConfig
from broker.protocol.errors import BrokerUnreachable, Refused
from broker.protocol.messages import (
    Assign,
    Drain,
    Ended,
    EndedAck,
    ErrorReply,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Leaving,
    Message,
    Profile,
    Progress,
    Ready,
    Register,
    Registered,
    Reregister,
    Running,
    Stop,
    ToWorker,
)
from broker.protocol.states import RequestState
from tuner.actions import Action, EndStep, Exit, StartStep, StartTrainer, StopTrainer, ToBroker, ToTrainer
from tuner.link import FromTrainer, GaveBack, GiveBack, Loaded, Resident, Unloadable
from tuner.place import Place
from tuner.steps import Key

log = logging.getLogger(__name__)

REGISTER_RETRY_S = (0.25, 0.5, 1.0, 2.0)  # the last one again and again
SILENT_BEATS = 3  # heartbeats without an answer, after which the broker counts as away
REPEAT_S = 3.0  # of results that nobody acknowledged
ACCEPT_S = 1.0  # the trainer starts when the broker has accepted us, or after this
GIVE_BACK_S = 8.0  # for the running step and the checkpoints
HAND_IN_S = 3.0  # for the acknowledgements of the last results
TRAINER_DEATHS = 3  # in a row
TRAINER_RETRY_S = 2.0  # after the second of them; after the first at once
END_MARGIN_S, END_MARGIN_SHARE = 60.0, 0.1  # the smaller one: leave so long before the allocation's end

EXIT_OK, EXIT_TRAINER = 0, 1
EXIT_ORPHANED = BrokerUnreachable.exit_code
EXIT_REFUSED = Refused.exit_code


class _Leave(Struct):
    reason: str
    code: int
    handing_in: bool = False  # nothing runs any more; only acknowledgements are awaited


class Supervision:
    """One worker's life: registered or not, trainer ready or not, leaving or not."""

    def __init__(self, config: WorkerConfig, place: Place) -> None:
        self._config = config
        self._place = place
        self._born_s = 0.0
        self._epoch = 0  # the last one given to us
        self._registered = False
        self._register_tries = 0
        self._start_s: float | None = None  # from the process's start to its first registration
        self._end_told_unix_s = 0.0
        self._rss_mb = 0.0
        self._loaded: Loaded | None = None
        self._profile: Profile | None = None
        self._models: list[str] = []  # that the trainer has loaded
        self._deaths = 0
        self._fault = "the trainer is loading"
        self._leave: _Leave | None = None
        self._exiting = False
        self._live: dict[Key, Progress | None] = {}  # with the last progress, so that a restarted broker learns of it
        self._results: dict[Key, Ended] = {}  # not acknowledged
        self._due: dict[Callable[[float], None], float] = {}
        self._actions: list[Action] = []

    # --- what happens -----------------------------------------------------------------------------------------------

    def begin(self, now_s: float, age_s: float, end_in_s: float | None) -> list[Action]:
        """The process is `age_s` old; its allocation lasts another `end_in_s`, if that is known."""
        self._born_s = now_s - age_s
        self._due[self._start_trainer] = now_s + ACCEPT_S
        self._due[self._orphaned] = now_s + self._config.orphan_timeout_s
        self._due[self._register] = now_s + REGISTER_RETRY_S[-1]
        self._ends_in(end_in_s, now_s)
        return self._take()

    def connected(self, now_s: float) -> list[Action]:
        """A connection to a broker stands: maybe a new one, so we introduce ourselves."""
        self._unregister("connected anew")
        self._register(now_s)
        return self._take()

    def disconnected(self, now_s: float) -> list[Action]:
        """The broker is away. Training goes on."""
        self._unregister("the connection is gone")
        self._due[self._register] = now_s + REGISTER_RETRY_S[-1]
        return self._take()

    def from_broker(self, message: ToWorker, now_s: float) -> list[Action]:
        """One message of the broker. One of an epoch that is over changes nothing."""
        epoch = getattr(message, "epoch", self._epoch)
        if epoch < self._epoch:
            log.info("ignored a %s of the old epoch %d", type(message).__name__, epoch)
            return []
        self._heard(now_s)
        match message:
            case Registered():
                self._accepted(message, now_s)
            case HeartbeatAck():
                pass
            case Reregister():
                self._reregister(now_s)
            case Assign():
                self._assign(message)
            case Stop():
                self._drop(Running(request_id=message.request_id, attempt=message.attempt))
            case EndedAck():
                self._results.pop((message.request_id, message.attempt), None)
                self._finish_if_handed_in(now_s)
            case Drain():
                self._leave_for(f"drained: {message.reason}", EXIT_OK, now_s)
            case Goodbye():
                log.warning("the broker wants this worker no more: %s", message.reason)
                self._exit(EXIT_OK if self._epoch else EXIT_REFUSED)
            case ErrorReply():
                log.error("the broker refused a message: %s", message.message)
        return self._take()

    def incompatible(self, reason: str, now_s: float) -> list[Action]:
        """The broker is of another version: nothing can be agreed with it any more."""
        self._leave_for(reason, EXIT_REFUSED, now_s)
        return self._take()

    def from_trainer(self, message: FromTrainer, now_s: float) -> list[Action]:
        """One message of the trainer. One about an attempt that was stopped or given back changes nothing."""
        match message:
            case Loaded():
                self._loaded, self._deaths = message, 0
                self._profile = message.profile
                self._say_ready()
            case Resident():
                self._models = message.models
            case Unloadable():
                log.error("cannot load %s: %s", self._config.model, message.reason)
                self._leave_for(message.reason, EXIT_TRAINER, now_s)
            case Progress():
                self._progressed(message)
            case Ended():
                self._ended(message, now_s)
            case GaveBack():
                self._gave_back(now_s)
        return self._take()

    def trainer_exited(self, returncode: int, now_s: float) -> list[Action]:
        """The trainer is no more. Its requests go back; unless we are leaving, another one starts."""
        self._loaded = None
        self._models = []
        if self._leave:
            self._gave_back(now_s)
            return self._take()
        how = f"killed by signal {-returncode}" if returncode < 0 else f"exited with code {returncode}"
        self._deaths += 1
        self._fault = f"trainer {how}"
        log.error("%s (%d in a row)", self._fault, self._deaths)
        if self._deaths >= TRAINER_DEATHS:
            self._leave_for(self._fault, EXIT_TRAINER, now_s)
        else:
            self._say(Leaving(epoch=self._epoch, reason=self._fault, given_back=self._all_back(), restarting=True))
            self._due[self._start_trainer] = now_s + (TRAINER_RETRY_S if self._deaths > 1 else 0.0)
        return self._take()

    def signalled(self, name: str, now_s: float) -> list[Action]:
        """The allocation is about to be preempted, cancelled or ended."""
        self._leave_for(f"signal {name}", EXIT_OK, now_s)
        return self._take()

    def step_known(self, key: Key, step_id: str) -> list[Action]:
        """Slurm shows the attempt as step `step_id`."""
        if key in self._live:
            self._progressed(Progress(epoch=0, request_id=key[0], attempt=key[1], step=0, step_id=step_id))
        return self._take()

    def end_known(self, end_unix_s: float, end_in_s: float, now_s: float) -> list[Action]:
        """Slurm told, later than at the start, when the allocation ends."""
        self._place = replace(self._place, end_unix_s=end_unix_s)
        self._ends_in(end_in_s, now_s)
        self._say_end()
        return self._take()

    def tick(self, now_s: float, rss_mb: float) -> list[Action]:
        """Does what is due. `rss_mb` is the trainer's memory."""
        self._rss_mb = rss_mb
        for timer, due_s in list(self._due.items()):
            if due_s <= now_s and self._due.get(timer) == due_s:
                del self._due[timer]
                timer(now_s)
        return self._take()

    @property
    def due_s(self) -> float:
        """When `tick` has something to do; infinity for never."""
        return min(self._due.values(), default=math.inf)

    # --- the broker -------------------------------------------------------------------------------------------------

    def _say(self, message: Message) -> None:
        """Said only to a broker that knows us: what matters is said again after each registration."""
        if self._registered:
            self._actions.append(ToBroker(message))

    def _say_register(self) -> None:
        place = self._place
        holding = list(self._live) + list(self._results)
        message = Register(
            allocation=self._config.allocation,
            key=self._config.key,
            incarnation=place.incarnation,
            job_id=place.job_id,
            restart_count=place.restart_count,
            host=place.host,
            gpus=place.gpus,
            pid=place.pid,
            end_unix_s=place.end_unix_s,
            running=[Running(request_id=request_id, attempt=attempt) for request_id, attempt in holding],
            ready=self._ready,
        )
        self._end_told_unix_s = place.end_unix_s
        self._actions.append(ToBroker(message))

    def _say_end(self) -> None:
        if self._registered and self._end_told_unix_s != self._place.end_unix_s:
            self._say_register()

    def _register(self, now_s: float) -> None:
        self._say_register()
        wait_s = REGISTER_RETRY_S[min(self._register_tries, len(REGISTER_RETRY_S) - 1)]
        self._register_tries += 1
        self._due[self._register] = now_s + wait_s

    def _unregister(self, why: str) -> None:
        if self._registered:
            log.warning("without a broker: %s; %d requests go on", why, len(self._live))
        self._registered = False
        self._register_tries = 0
        for timer in (self._beat, self._repeat, self._silent):
            self._due.pop(timer, None)

    def _reregister(self, now_s: float) -> None:
        if self._registered:  # else a Register is under way
            self._unregister("it does not know us")
            self._register(now_s)

    def _accepted(self, message: Registered, now_s: float) -> None:
        self._registered, self._epoch, self._register_tries = True, message.epoch, 0
        self._due.pop(self._register, None)
        if self._start_s is None:
            self._start_s = now_s - self._born_s
        if self._start_trainer in self._due and not self._deaths:
            self._due[self._start_trainer] = now_s
        self._due[self._beat] = now_s + self._config.heartbeat_s
        self._due[self._repeat] = now_s + REPEAT_S
        self._heard(now_s)
        for attempt in message.drop:
            self._drop(attempt)
        self._say_end()
        self._say_ready()
        for progress in self._live.values():
            if progress:
                self._say(replace(progress, epoch=self._epoch))
        self._say_results()
        if self._leave:
            self._say(Leaving(epoch=self._epoch, reason=self._leave.reason))

    def _heard(self, now_s: float) -> None:
        self._due[self._orphaned] = now_s + self._config.orphan_timeout_s
        if self._registered:
            self._due[self._silent] = now_s + SILENT_BEATS * self._config.heartbeat_s

    def _silent(self, now_s: float) -> None:
        self._unregister("it does not answer")
        self._register(now_s)

    def _orphaned(self, now_s: float) -> None:
        self._leave_for("the broker stayed away", EXIT_ORPHANED, now_s)

    def _beat(self, now_s: float) -> None:
        self._say(Heartbeat(epoch=self._epoch, rss_mb=self._rss_mb, models=self._models))
        self._due[self._beat] = now_s + self._config.heartbeat_s

    def _repeat(self, now_s: float) -> None:
        self._say_results()
        self._due[self._repeat] = now_s + REPEAT_S

    def _say_results(self) -> None:
        for result in self._results.values():
            self._say(replace(result, epoch=self._epoch))

    @property
    def _ready(self) -> bool:
        return self._loaded is not None and self._leave is None

    def _say_ready(self) -> None:
        if self._loaded and self._ready:
            phases_s = {"start": self._start_s or 0.0, **self._loaded.phases_s}
            self._say(Ready(epoch=self._epoch, phases_s=phases_s, profile=self._loaded.profile))

    # --- requests ---------------------------------------------------------------------------------------------------

    def _assign(self, message: Assign) -> None:
        key = (message.request_id, message.attempt)
        if key in self._live:
            return
        if key in self._results:
            self._say(replace(self._results[key], epoch=self._epoch))
            return
        if not self._ready:
            self._refuse(Running(request_id=message.request_id, attempt=message.attempt))
            return
        for request_id, attempt in list(self._live):
            if request_id == message.request_id:  # the broker gave it a new attempt: the older one is void
                self._drop(Running(request_id=request_id, attempt=attempt))
        self._live[key] = None
        self._actions.append(ToTrainer(message))
        if self._config.steps:
            self._actions.append(StartStep(message.request_id, message.attempt, message.user))

    def _refuse(self, attempt: Running) -> None:
        reason = self._leave.reason if self._leave else self._fault
        restarting = self._leave is None
        self._say(Leaving(epoch=self._epoch, reason=reason, given_back=[attempt], restarting=restarting))

    def _drop(self, attempt: Running) -> None:
        key = (attempt.request_id, attempt.attempt)
        self._results.pop(key, None)
        if key in self._live:
            del self._live[key]
            stop = Stop(request_id=attempt.request_id, attempt=attempt.attempt, reason="the broker dropped it")
            self._actions.append(ToTrainer(stop))
            self._actions.append(EndStep(*key, ok=False))

    def _progressed(self, message: Progress) -> None:
        key = (message.request_id, message.attempt)
        if key not in self._live:
            return
        before = self._live[key]
        if before:
            message = _merged(before, message)
        self._live[key] = message
        self._say(replace(message, epoch=self._epoch))

    def _ended(self, message: Ended, now_s: float) -> None:
        key = (message.request_id, message.attempt)
        if key not in self._live:
            return
        del self._live[key]
        self._results[key] = message
        self._actions.append(EndStep(*key, ok=message.state is RequestState.COMPLETED))
        self._say(replace(message, epoch=self._epoch))

    # --- the trainer and the end ------------------------------------------------------------------------------------

    def _start_trainer(self, now_s: float) -> None:
        if not self._leave:
            self._actions.append(StartTrainer(self._profile))

    def _ends_in(self, end_in_s: float | None, now_s: float) -> None:
        if end_in_s is not None:
            lifetime_s = end_in_s + now_s - self._born_s
            self._due[self._end_near] = now_s + end_in_s - min(END_MARGIN_S, END_MARGIN_SHARE * lifetime_s)

    def _end_near(self, now_s: float) -> None:
        self._leave_for("the allocation's time limit is near", EXIT_OK, now_s)

    def _leave_for(self, reason: str, code: int, now_s: float) -> None:
        if self._leave or self._exiting:
            return
        loaded = self._loaded is not None
        self._leave = _Leave(reason, code)
        log.info("leaving: %s; %d requests go back", reason, len(self._live))
        if loaded:
            self._say(Leaving(epoch=self._epoch, reason=reason))
            self._actions.append(ToTrainer(GiveBack()))
            self._due[self._gave_back] = now_s + GIVE_BACK_S
        else:
            self._gave_back(now_s)

    def _gave_back(self, now_s: float) -> None:
        """Checkpoints are written, or the trainer is gone or takes too long: the older checkpoints must do."""
        if not self._leave or self._leave.handing_in:
            return
        self._leave.handing_in = True
        self._due.pop(self._gave_back, None)
        self._actions.append(StopTrainer())
        self._say(Leaving(epoch=self._epoch, reason=self._leave.reason, given_back=self._all_back()))
        self._due[self._finish] = now_s + HAND_IN_S
        self._finish_if_handed_in(now_s)

    def _all_back(self) -> list[Running]:
        back = [Running(request_id=request_id, attempt=attempt) for request_id, attempt in self._live]
        self._actions.extend(EndStep(*key, ok=False) for key in self._live)
        self._live.clear()
        return back

    def _finish_if_handed_in(self, now_s: float) -> None:
        if self._leave and self._leave.handing_in and not self._results:
            self._finish(now_s)

    def _finish(self, now_s: float) -> None:
        if self._leave and not self._exiting:
            self._say(Leaving(epoch=self._epoch, reason=self._leave.reason, final=True))
            self._exit(self._leave.code)

    def _exit(self, code: int) -> None:
        self._exiting = True
        self._due.clear()
        self._actions += [StopTrainer(), Exit(code)]

    def _take(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions


def _merged(before: Progress, after: Progress) -> Progress:
    """`after`, with what only an earlier message told."""
    return replace(
        after,
        step=max(before.step, after.step),
        loss=before.loss if after.loss is None else after.loss,
        score=before.score if after.score is None else after.score,
        remaining_s=before.remaining_s if after.remaining_s is None else after.remaining_s,
        start=after.start or before.start,
        lookup_s=after.lookup_s or before.lookup_s,
        first_step_unix_s=after.first_step_unix_s or before.first_step_unix_s,
        step_id=after.step_id or before.step_id,
    )

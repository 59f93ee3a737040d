"""The trainer process: holds the base model and trains the requests that its supervisor passes on.

Started as `python -I -m tuner.trainer ORDERS_FD WORKER_FILE SUPERVISOR_PID`: the parent, which imports everything and
forks a trainer on each order (`tuner.forkserver`). A trainer takes orders from its supervisor alone, and does not
outlive it.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import zmq

from broker.protocol.config import WorkerConfig
from broker.protocol.errors import PromptTunerError
from broker.protocol.messages import Assign, Ended, Profile, Progress, Running, Stop
from tuner.forkserver import Order, die_with, serve
from tuner.link import FromTrainer, GaveBack, GiveBack, Loaded, Resident, Unloadable, encode, to_trainer_decoder
from tuner.worker import read_worker_file, start_log

log = logging.getLogger(__name__)

IDLE_POLL_MS = 1000  # between two looks whether the supervisor lives; a message ends the wait at once
LINGER_MS = 5000


class Warm(Protocol):
    """What the loop needs of a `tuner.session.Session`."""

    @property
    def busy(self) -> bool: ...

    @property
    def resident_models(self) -> list[str]: ...

    def load(self) -> dict[str, float]: ...

    def first_step(self) -> float: ...

    def warm_up(self) -> tuple[float, Profile]: ...

    def join(self, assign: Assign) -> None: ...

    def stop(self, request_id: int, attempt: int) -> None: ...

    def step(self) -> list[Progress | Ended]: ...

    def give_back(self) -> list[Running]: ...


def make_session(config: WorkerConfig) -> Warm:
    """The real session; imports torch."""
    from tuner.session import Session

    return Session(
        model_path=config.model_path,
        bank_dir=Path(config.bank_dir),
        checkpoint_dir=Path(config.checkpoint_dir),
        checkpoint_s=config.checkpoint_s,
        slots=config.slots,
        model=config.model,
        more_models=config.more_models,
    )


def import_all(config: WorkerConfig) -> None:
    """Imports what the real session needs, and leaves the process fit to be forked."""
    from tuner.model import import_ahead

    import_ahead([config.model_path, *config.more_models.values()])


class Trainer:
    """Loads, then steps and listens in turns, until it is told to give back or its supervisor is gone."""

    def __init__(self, link: zmq.Socket[bytes], supervisor_pid: int) -> None:
        self._link = link
        self._supervisor_pid = supervisor_pid
        self._told: list[str] = []  # the resident models

    def load(self, make: Callable[[], Warm], order: Order) -> Warm:
        """Raises `PromptTunerError` when the base cannot be used."""
        session = make()
        imports_s = time.monotonic() - order.asked_mono_s  # of the parent; where that was done before: of the fork
        phases_s = session.load()
        phases_s["imports"] = imports_s + phases_s.get("imports", 0.0)
        phases_s["first_step"] = session.first_step()
        profile = order.profile
        if profile is None:
            phases_s["warm_up"], profile = session.warm_up()
        gc.collect()
        gc.freeze()  # the base and the libraries stay: no collection needs to look at them again
        self._say(Loaded(phases_s=phases_s, profile=profile))
        return session

    def serve(self, session: Warm) -> None:
        """Returns when there is nothing more to do in this process."""
        while os.getppid() == self._supervisor_pid:
            if not self._listen(session):
                return
            if session.busy:
                for message in session.step():
                    self._say(message)
            resident = sorted(session.resident_models)
            if resident != self._told:
                self._told = resident
                self._say(Resident(models=self._told))
        log.error("the supervisor is gone")

    def unloadable(self, reason: str) -> None:
        self._say(Unloadable(reason=reason))

    def _listen(self, session: Warm) -> bool:
        """Takes every message that has arrived, waiting for one only when there is nothing to train. False: to end."""
        wait_ms = 0 if session.busy else IDLE_POLL_MS
        while self._link.poll(wait_ms):
            wait_ms = 0
            match to_trainer_decoder.decode(self._link.recv()):
                case Assign() as assign:
                    session.join(assign)
                case Stop(request_id=request_id, attempt=attempt):
                    session.stop(request_id, attempt)
                case GiveBack():
                    self._say(GaveBack(running=session.give_back()))
                    return False
        return True

    def _say(self, message: FromTrainer) -> None:
        self._link.send(encode(message))


def train(order: Order, config: WorkerConfig, make: Callable[[WorkerConfig], Warm]) -> int:
    """Runs one trainer; returns its exit code."""
    link: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    link.setsockopt(zmq.LINGER, LINGER_MS)
    link.set_hwm(0)
    link.connect(order.endpoint)
    trainer = Trainer(link, os.getppid())
    try:
        session = trainer.load(lambda: make(config), order)
    except PromptTunerError as error:
        trainer.unloadable(str(error))
        return error.exit_code
    else:
        trainer.serve(session)
        return 0
    finally:
        link.close()
        zmq.Context.instance().term()


def main(
    argv: list[str],
    make: Callable[[WorkerConfig], Warm] = make_session,
    prepare: Callable[[WorkerConfig], None] = import_all,
) -> int:
    """Runs the parent and each trainer that it forks; returns the exit code. `argv`: the descriptor that orders come
    from, the worker file, the supervisor's pid."""
    orders = socket.socket(fileno=int(argv[0]))
    die_with(int(argv[2]))
    start_log("trainer")
    config = read_worker_file(Path(argv[1]))
    prepare(config)
    gc.collect()
    gc.freeze()  # what is shared with the trainers is not written to by a collection
    order = serve(orders)
    return 0 if order is None else train(order, config, make)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

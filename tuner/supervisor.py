"""The supervisor process: carries out what `tuner.supervision` decides, over sockets, processes, signals and the clock.

It stays outside the trainer's interpreter, so that heartbeats go on while a training step holds that one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from broker.protocol.config import WorkerConfig
from broker.protocol.errors import AuthError, ConfigError, PromptTunerError, ProtocolMismatch
from broker.protocol.messages import Message, Profile, pack, to_worker_decoder, unpack
from tuner import place
from tuner.actions import Action, EndStep, Exit, StartStep, StartTrainer, StopTrainer, ToBroker, ToTrainer
from tuner.forkserver import ForkServer
from tuner.link import encode, from_trainer_decoder
from tuner.steps import Steps
from tuner.supervision import Supervision

log = logging.getLogger(__name__)

TRAINER_COMMAND = (sys.executable, "-I", "-m", "tuner.trainer")
MAX_BYTES = 1 << 30  # of one message: both data sets of a request
IPC_PATH_MAX = 107  # sun_path, without its closing NUL
RECONNECT_MS, RECONNECT_MAX_MS = 50, 1000
PING_MS, PING_TIMEOUT_MS = 5_000, 30_000
FAREWELL_MS = 1000  # for the last words to leave this process
LAST_WORDS_MS = 100  # for those of a trainer that has just ended
STEPS_PATIENCE_S = 1.0
BATCH = 256  # messages of one side before the other side is heard again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
WOKEN = 0  # no signal: a thread has something


class Supervisor:
    """One worker's outer process. Raises `AuthError` or `ConfigError` before anything has started."""

    def __init__(self, config: WorkerConfig, worker_file: Path, trainer_command: Sequence[str]) -> None:
        self._config = config
        self._place = place.here(os.environ)
        self._core = Supervision(config, self._place)
        self._context = zmq.Context()
        self._folder: Path | None = None
        self._link = self._bind_link()
        self._broker, self._monitor = _dial(self._context, config)
        self._trainers = ForkServer(trainer_command, worker_file)
        self._steps = Steps(config.srun, self._place.job_id, config.slots, os.environ)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._end_found_unix_s = 0.0
        self._exit_code: int | None = None

    def run(self) -> int:
        """Works until the worker's end; returns the exit code."""
        with self._signals():
            try:
                self._begin()
                while self._exit_code is None:
                    self._turn()
                return self._exit_code
            finally:
                self._close()

    def _begin(self) -> None:
        end_in_s = self._place.end_unix_s - time.time() if self._place.end_unix_s else None
        self._do(self._core.begin(time.monotonic(), place.since_process_start_s(), end_in_s))
        self._broker.connect(self._config.broker)
        log.info("worker %s of job %s dials %s", self._config.allocation, self._place.job_id, self._config.broker)
        if end_in_s is None and "SLURM_JOB_ID" in os.environ:
            threading.Thread(target=self._ask_end, daemon=True).start()

    def _turn(self) -> None:
        """Waits for whatever comes first, then hears every side once."""
        sources: list[Any] = [self._broker, self._monitor, self._link, self._wake_read]
        sources += [*self._steps.descriptors(), *self._trainers.descriptors()]
        due_s = min(self._core.due_s, self._steps.due_s() or self._core.due_s)
        wait_ms = max(0, min(60_000, (due_s - time.monotonic()) * 1000 + 1))
        zmq.zmq_poll([(source, zmq.POLLIN) for source in sources], int(wait_ms))
        self._hear_wakes()
        self._hear_monitor()
        self._hear_broker()
        self._hear_trainer(wait_ms=0)
        for key, step_id in self._steps.advance(time.monotonic()):
            self._do(self._core.step_known(key, step_id))
        self._do(self._core.tick(time.monotonic(), place.rss_mb(self._trainers.pid)))

    # --- hearing ----------------------------------------------------------------------------------------------------

    def _hear_wakes(self) -> None:
        for number in _drain(self._wake_read):
            if number in SIGNALS:
                self._do(self._core.signalled(signal.Signals(number).name, time.monotonic()))
            elif number == WOKEN and self._end_found_unix_s:
                end_unix_s, self._end_found_unix_s = self._end_found_unix_s, 0.0
                self._do(self._core.end_known(end_unix_s, end_unix_s - time.time(), time.monotonic()))
        code = self._trainers.poll()
        if code is not None:
            self._trainer_ended(code)

    def _hear_monitor(self) -> None:
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._do(self._core.connected(time.monotonic()))
            elif event == zmq.EVENT_DISCONNECTED:
                self._do(self._core.disconnected(time.monotonic()))
            else:
                log.warning("the broker at %s refuses our connection", self._config.broker)

    def _hear_broker(self) -> None:
        for _ in range(BATCH):
            try:
                message = unpack(self._broker.recv_multipart(zmq.NOBLOCK), to_worker_decoder)
            except zmq.Again:
                return
            except ProtocolMismatch as error:
                self._do(self._core.incompatible(error.message, time.monotonic()))
            except PromptTunerError as error:
                log.warning("ignored what the broker said: %s", error.message)
            else:
                self._do(self._core.from_broker(message, time.monotonic()))

    def _hear_trainer(self, wait_ms: int) -> None:
        for _ in range(BATCH):
            if not self._link.poll(wait_ms):
                return
            try:
                message = from_trainer_decoder.decode(self._link.recv(zmq.NOBLOCK))
            except msgspec.MsgspecError as error:
                log.error("ignored what the trainer said: %s", error)
            else:
                self._remove_folder()  # it is connected: even kill -9 leaves nothing behind now
                self._do(self._core.from_trainer(message, time.monotonic()))

    def _ask_end(self) -> None:
        """In a thread: Slurm may take its time."""
        squeue = str(Path(self._config.srun).with_name("squeue"))
        self._end_found_unix_s = place.ask_end_unix_s(self._place.job_id, squeue)
        os.write(self._wake_write, bytes([WOKEN]))

    # --- doing ------------------------------------------------------------------------------------------------------

    def _do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case ToBroker(message):
                    self._send(message)
                case ToTrainer(message):
                    with contextlib.suppress(zmq.Again):  # it has just ended; its requests go back anyway
                        self._link.send(encode(message), zmq.NOBLOCK)
                case StartTrainer(profile):
                    self._start_trainer(profile)
                case StopTrainer():
                    self._trainers.stop()
                case StartStep(request_id, attempt, user):
                    self._steps.start(request_id, attempt, user, time.monotonic())
                case EndStep(request_id, attempt, ok):
                    self._steps.end(request_id, attempt, ok, time.monotonic())
                case Exit(code):
                    self._exit_code = code

    def _send(self, message: Message) -> None:
        try:
            self._broker.send_multipart(pack(message), zmq.NOBLOCK)
        except zmq.Again:
            log.debug("no broker to take a %s", type(message).__name__)

    def _start_trainer(self, profile: Profile | None) -> None:
        address = self._link.getsockopt_string(zmq.LAST_ENDPOINT)
        with _blocked(SIGNALS):  # the trainer inherits this: it takes orders from us alone
            self._trainers.start(address, profile, _trainer_environment())

    def _trainer_ended(self, returncode: int) -> None:
        self._hear_trainer(wait_ms=LAST_WORDS_MS)
        self._link.close(linger=0)
        self._link = self._bind_link()  # a fresh one: nothing of the old trainer reaches the next
        self._do(self._core.trainer_exited(returncode, time.monotonic()))

    def _bind_link(self) -> zmq.Socket[bytes]:
        self._remove_folder()
        self._folder = _socket_folder()
        link = self._context.socket(zmq.PAIR)
        link.setsockopt(zmq.LINGER, 0)
        link.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
        link.set_hwm(0)
        link.bind(f"ipc://{self._folder}/trainer")
        return link

    def _remove_folder(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals arrive as bytes of a pipe: the poll wakes up for them, nothing is interrupted."""
        before = {number: signal.signal(number, _noted) for number in (*SIGNALS, signal.SIGCHLD)}
        descriptor = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _close(self) -> None:
        self._trainers.close()
        self._broker.disable_monitor()
        self._monitor.close(linger=0)
        self._broker.close(linger=FAREWELL_MS)
        self._link.close(linger=0)
        self._steps.close(STEPS_PATIENCE_S)
        self._remove_folder()
        self._context.term()
        log.info("worker ends with code %s", self._exit_code)


def _noted(number: int, frame: Any) -> None:
    """The wake-up pipe has it."""


def _socket_folder() -> Path:
    """A fresh folder that its owner alone may enter, with a path short enough for a socket."""
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp")):
        if len(os.fsencode(parent)) + len("/pt-12345678/trainer") > IPC_PATH_MAX:
            continue
        with contextlib.suppress(OSError):
            return Path(tempfile.mkdtemp(prefix="pt-", dir=parent))
    raise ConfigError("no temporary folder for the trainer's socket", "set TMPDIR to a writable one with a short path")


def _dial(context: zmq.Context[zmq.Socket[bytes]], config: WorkerConfig) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """The socket to the broker, not connected yet, and the one that tells of its connections."""
    if config.broker.startswith("tcp://") and not config.server_public_key:
        raise AuthError(f"no public key of the broker at {config.broker}", "TCP without it would not be encrypted")
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.IMMEDIATE, 1)  # nothing waits for a broker that is away: what matters is said again
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
    dealer.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    dealer.setsockopt(zmq.HEARTBEAT_IVL, PING_MS)
    dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, PING_TIMEOUT_MS)
    if config.server_public_key:
        dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
        dealer.curve_serverkey = config.server_public_key.encode("ascii")
    events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    return dealer, dealer.get_monitor_socket(events)


def _trainer_environment() -> dict[str, str]:
    # Looking for a GPU must leave the trainers' parent fit to fork.
    env = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTORCH_NVML_BASED_CUDA_CHECK="1")
    env.setdefault("OPENBLAS_NUM_THREADS", "1")  # it would start them when it is imported, before the fork
    if "SLURM_CPUS_PER_TASK" in env:
        env.setdefault("OMP_NUM_THREADS", env["SLURM_CPUS_PER_TASK"])
    return env


@contextlib.contextmanager
def _blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _drain(descriptor: int) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return os.read(descriptor, 4096)
    return b""

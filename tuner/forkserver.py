"""The parent of a worker's trainers: it has imported everything, holds no model, and forks a trainer on each order.

A trainer becomes a child of the supervisor, not of this parent: the supervisor is a subreaper, and the process between
them ends at once. So the supervisor waits for its trainer, kills it and takes it down with itself as if it had started
it, and the parent's own end costs no request anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from broker.protocol.messages import Profile

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36
PARENT_NAME, TRAINER_NAME = "pt-parent", "pt-trainer"  # as top shows them
ORDER_MAX = 1 << 16
ADOPTED_POLL_S = 0.0005


class Order(Struct, frozen=True):
    """Fork one trainer."""

    endpoint: str  # of its link
    asked_mono_s: float
    profile: Profile | None = None  # what an earlier trainer of this worker has measured


class Forked(Struct, frozen=True):
    pid: int  # 0: the fork failed


_decode_order = msgspec.json.Decoder(Order).decode
_decode_forked = msgspec.json.Decoder(Forked).decode
_encode = msgspec.json.encode


def serve(orders: socket.socket) -> Order | None:
    """Forks a trainer for each order. Returns in each trainer, with its order and as a child of this process's parent;
    and here, with None, when nobody can order any more."""
    supervisor_pid = os.getppid()
    _call_this(PARENT_NAME)
    while True:
        try:
            content = orders.recv(ORDER_MAX)
        except ConnectionError:
            content = b""
        if not content:
            return None
        order = _decode_order(content)
        _warn_of_threads()
        pid = _fork_twice(supervisor_pid)
        if pid is None:
            orders.close()
            return order
        with contextlib.suppress(ConnectionError):
            orders.send(_encode(Forked(pid)))


def _fork_twice(supervisor_pid: int) -> int | None:
    """In the parent: the trainer's pid, once it is the supervisor's child (or 0). In the trainer: None."""
    read, write = os.pipe()
    try:
        middle_pid = os.fork()
    except OSError as error:
        log.error("cannot fork a trainer: %s", error)
        os.close(read)
        os.close(write)
        return 0
    if middle_pid:
        os.close(write)
        told = b""
        while part := os.read(read, 64):
            told += part
        os.close(read)
        os.waitpid(middle_pid, 0)
        return int(told or b"0")
    os.close(read)
    middle_pid = os.getpid()
    try:
        if pid := os.fork():
            os.write(write, str(pid).encode())
            os._exit(0)
    except OSError:
        os._exit(1)
    os.close(write)
    while os.getppid() == middle_pid:  # the kernel tells nobody when it hands a child over
        time.sleep(ADOPTED_POLL_S)
    die_with(supervisor_pid)
    _call_this(TRAINER_NAME)
    return None


def _warn_of_threads() -> None:
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        log.warning("%d threads in the trainers' parent: a forked trainer may hang", threads)


def _call_this(name: str) -> None:
    _prctl(PR_SET_NAME, name.encode())


def _prctl(option: int, value: int | bytes) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def die_with(supervisor_pid: int) -> None:
    """Ends this process when its parent ends, also when it already has. Raises SystemExit then."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor_pid:
        raise SystemExit(1)


class ForkServer:
    """The supervisor's hold on the parent and on the one trainer that it has forked. No call blocks for long."""

    def __init__(self, command: Sequence[str], worker_file: Path) -> None:
        self._command = command
        self._worker_file = worker_file
        self._server: subprocess.Popen[bytes] | None = None
        self._orders: socket.socket | None = None
        self._awaited = False  # an order is out
        self._failed = False  # it could not be carried out
        self._pid = 0
        _prctl(PR_SET_CHILD_SUBREAPER, 1)

    def start(self, endpoint: str, profile: Profile | None, env: Mapping[str, str]) -> None:
        """Orders a trainer; starts the parent first if there is none."""
        order = _encode(Order(endpoint, time.monotonic(), profile))
        if self._server is None or self._server.poll() is not None or not self._send(order):
            self._start_server(env)
            self._send(order)
        self._awaited = True

    def descriptors(self) -> list[int]:
        """What to poll: readable means that `poll` may know more."""
        return [self._orders.fileno()] if self._orders and self._awaited else []

    @property
    def pid(self) -> int:
        """The trainer's; as long as there is none, its parent's; 0 for neither."""
        return self._pid or (self._server.pid if self._server else 0)

    def poll(self) -> int | None:
        """The exit code of the trainer, or of the parent that could not fork it; None while all is well, and after it
        was told once."""
        if self._awaited:
            self._hear()
        if self._pid:
            return self._reap(os.WNOHANG)
        if self._failed:
            self._failed = False
            return 1
        if self._awaited and self._server and (code := self._server.poll()) is not None:
            self._awaited = False
            return code or 1
        return None

    def stop(self) -> None:
        """Kills the trainer; one that is only ordered never comes to be."""
        if self._awaited:
            self._hear()
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self._reap(0)
        elif self._awaited:
            self._stop_server()
        self._awaited = False

    def close(self) -> None:
        """Ends the trainer and the parent."""
        self.stop()
        self._stop_server()

    def _start_server(self, env: Mapping[str, str]) -> None:
        self._stop_server()
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.setblocking(False)
        arguments = [*self._command, str(theirs.fileno()), str(self._worker_file), str(os.getpid())]
        with theirs:
            self._server = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, env=dict(env), pass_fds=[theirs.fileno()]
            )

    def _stop_server(self) -> None:
        if self._orders:
            self._orders.close()
            self._orders = None
        if self._server:
            self._server.kill()
            self._server.wait()
            self._server = None

    def _send(self, order: bytes) -> bool:
        try:
            return self._orders is not None and self._orders.send(order) > 0
        except OSError:
            return False

    def _hear(self) -> None:
        try:
            content = self._orders.recv(ORDER_MAX) if self._orders else b""
        except BlockingIOError:
            return
        except ConnectionError:
            content = b""
        if content:
            self._awaited = False
            self._pid = _decode_forked(content).pid
            self._failed = self._pid == 0

    def _reap(self, options: int) -> int | None:
        pid, status = os.waitpid(self._pid, options)
        if not pid:
            return None
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

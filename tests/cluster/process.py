"""Processes that outlive who started them: known by pid and start time, so that no stranger is ever signalled."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.errors import ClusterError

# Children of this very process have to be reaped, or they stay as zombies.
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Process:
    """One process, not merely a number: a pid that the kernel gave to another program later is not it."""

    pid: int
    start_ticks: int

    def alive(self) -> bool:
        child = _children.get(self.pid)
        if child is not None and child.poll() is not None:
            del _children[self.pid]
        return _start_ticks(self.pid) == self.start_ticks

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens when the process has ended."""
        if self.alive():
            with suppress(ProcessLookupError):  # it may end between the two lines
                os.kill(self.pid, number)


def spawn(argv: list[str], env: dict[str, str], user: str | None, log: Path) -> Process:
    """Start a daemon in a session of its own, its output appended to `log`, as `user` (None: as this process)."""
    with log.open("ab") as output:
        child: subprocess.Popen[bytes] = subprocess.Popen(
            argv,
            env=env,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            **identity(user),
        )
    _children[child.pid] = child
    start_ticks = _start_ticks(child.pid)
    return Process(child.pid, start_ticks if start_ticks is not None else -1)


def identity(user: str | None) -> dict[str, Any]:
    """Popen's arguments to become a daemon's user with no group but its own; None: to stay who calls."""
    return {} if user is None else {"user": user, "group": user, "extra_groups": []}


def write_pid(file: Path, process: Process) -> None:
    file.write_text(f"{process.pid} {process.start_ticks}\n")


def read_pid(file: Path) -> Process | None:
    """The process that a pid file names; None when there is no such file, or its writer was killed before it wrote."""
    try:
        pid, start_ticks = file.read_text().split()
    except (FileNotFoundError, ValueError):
        return None
    return Process(int(pid), int(start_ticks))


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, poll_s: float = 0.05) -> None:
    """Return as soon as `condition` holds. Raises ClusterError, naming `what`, after `timeout_s`."""
    end_mono_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end_mono_s:
            raise ClusterError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(poll_s)


def kill_all(find: Callable[[], Iterable[Process]], timeout_s: float = 10) -> None:
    """Send SIGKILL to what `find` finds, again and again until it finds nothing: processes may fork meanwhile."""

    def none_left() -> bool:
        found = list(find())
        for process in found:
            process.signal(signal.SIGKILL)
        return not found

    wait_until(none_left, timeout_s, "killed processes to end", poll_s=0.02)


def marked(marks: Iterable[bytes]) -> Iterator[Process]:
    """Processes that have one of `marks` ("NAME=value") in their environment, and their descendants.

    Never this process nor its ancestors: someone may stop a cluster from inside one of its jobs.
    """
    wanted, spared = set(marks), set(_ancestors(os.getpid()))
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    parents = {pid: _parent(pid) for pid in pids}
    found = {pid for pid in pids if _has_mark(pid, wanted)}
    grew = True
    while grew:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        found |= children
        grew = bool(children)
    for pid in sorted(found - spared):
        start_ticks = _start_ticks(pid)
        if start_ticks is not None:
            yield Process(pid, start_ticks)


def _ancestors(pid: int) -> Iterator[int]:
    current: int | None = pid
    while current:
        yield current
        current = _parent(current)


def _has_mark(pid: int, wanted: set[bytes]) -> bool:
    try:
        return not wanted.isdisjoint(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return False  # ended, or another user's: not ours


def _start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when there is none, or only a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def _parent(pid: int) -> int | None:
    fields = _stat(pid)
    return None if fields is None else int(fields[1])


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in parentheses may hold spaces; the fields are counted from behind it.
    return text[text.rindex(")") + 2 :].split()

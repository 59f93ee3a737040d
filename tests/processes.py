"""Processes of one installation, found by the files that they were started with, and waiting for what they do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T | None], timeout_s: float, what: str | Callable[[], str]) -> T:
    """The first true value of `condition`, asked again and again. Fails with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s:g} s: {what if isinstance(what, str) else what()}")


def supervisors(root: Path) -> dict[int, str]:
    """The worker processes whose files are below `root`: allocation name by pid."""
    return _workers(root, "tuner.worker")


def trainers(root: Path) -> dict[int, str]:
    """The training processes whose files are below `root`: allocation name by pid."""
    return {pid: name for pid, name in forks(root).items() if _name(pid) == "pt-trainer"}


def forks(root: Path) -> dict[int, str]:
    """The training processes and the parents that they are forked from: allocation name by pid."""
    return _workers(root, "tuner.trainer")


def _workers(root: Path, module: str) -> dict[int, str]:
    found = {}
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        words = cmdline(pid)
        if words[1:4] == ["-I", "-m", module]:  # srun, too, has these words, but after its own
            file = next(Path(word) for word in words[4:] if word.endswith("/worker.json"))
            if root in file.parents:
                found[pid] = file.parent.name
    return found


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def cmdline(pid: int) -> list[str]:
    """The words of a process; none if it is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
    except OSError:
        return []


def alive(pid: int) -> bool:
    return cmdline(pid) not in ([], [""])


def kill(pid: int, timeout_s: float = 20) -> None:
    """kill -9; returns when the process is gone."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), timeout_s, f"process {pid} is gone")

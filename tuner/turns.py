"""Turns among the processes that load models: one reader of a model on a node, few cold loads on a filesystem.

A turn is a POSIX record lock on a small file, so that it ends with its process, also by kill -9. Where locks do not
work, or a turn takes too long to come, work goes on without: turns save time, they guard nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.005, 0.25
_TAKEN = (errno.EACCES, errno.EAGAIN)


def node_folder() -> Path | None:
    """This user's private folder for the locks of this node; None if there can be none."""
    for parent in ("/dev/shm", tempfile.gettempdir()):
        folder = Path(parent, f"prompttuner-{os.geteuid()}")
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
                return folder
    return None


@contextlib.contextmanager
def turn(folder: Path | None, name: str, at_once: int = 1, limit_s: float = 600.0) -> Iterator[bool]:
    """Waits until fewer than `at_once` others of the folder's processes hold a turn `name`, at most `limit_s` seconds;
    whether this one holds it now. Two threads of one process do not exclude each other."""
    descriptor = _wait(folder, name, at_once, limit_s) if folder else -1
    try:
        yield descriptor >= 0
    finally:
        if descriptor >= 0:
            os.close(descriptor)  # which is also the lock's end


def name_of(path: Path) -> str:
    """A file name that stands for `path`, the same for each way to write it."""
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]


def _wait(folder: Path, name: str, at_once: int, limit_s: float) -> int:
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline_mono_s = time.monotonic() + limit_s
    wait_s = FIRST_WAIT_S
    while True:
        for number in range(at_once):
            try:
                descriptor = _take(folder / f"{name}.{number}")
            except OSError as error:
                log.info("no turns in %s: %s", folder, error)
                return -1
            if descriptor >= 0:
                return descriptor
        if time.monotonic() >= deadline_mono_s:
            log.warning("waited %.0f s for a turn in %s: going on without", limit_s, folder)
            return -1
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _take(file: Path) -> int:
    """A descriptor that holds the lock, or -1 if another process does."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in _TAKEN:
            return -1
        raise
    return descriptor

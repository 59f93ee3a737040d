"""Reads a model's files once: ahead of use, by several threads, by one process of a node. And their digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tuner.turns import name_of, node_folder, turn

log = logging.getLogger(__name__)

READERS = 4
CHUNK = 8 << 20
PROBES = 64  # of one file
COLD_LOADS = 4  # at once, of all nodes that share a folder
HASH_BLOCK = 1 << 22


class Digest:
    """sha256 of a model directory (`base_digest`), computed beside the work that does not need it yet."""

    def __init__(self, directory: Path, kept: Path | None) -> None:
        self._future: Future[str] = Future()
        threading.Thread(target=self._compute, args=(directory, kept), name="digest", daemon=True).start()

    def value(self) -> str:
        """Waits for the digest. Raises `OSError` if a file could not be read."""
        return self._future.result()

    def _compute(self, directory: Path, kept: Path | None) -> None:
        try:
            self._future.set_result(known_digest(directory, kept))
        except OSError as error:
            self._future.set_exception(error)


def base_digest(directory: Path) -> str:
    """sha256 over config.json and the safetensors files, in the order of their names, with names and sizes."""
    whole = hashlib.sha256()
    for file in _digested(directory):
        whole.update(f"{file.name}:{file.stat().st_size}\n".encode())
        with open(file, "rb", buffering=0) as content:
            while block := content.read(HASH_BLOCK):
                whole.update(block)
    return whole.hexdigest()


def known_digest(directory: Path, kept: Path | None) -> str:
    """`base_digest`, from the folder `kept` if it was computed there for these very files before: same inodes, sizes
    and times of change. Nobody else may be able to write to that folder."""
    if kept is None:
        return base_digest(directory)
    file = kept / f"{name_of(directory)}.json"
    with turn(node_folder(), f"digest-{name_of(directory)}"):
        seen = _identity(directory)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(file.read_bytes())
            if found["files"] == seen and len(found["sha256"]) == 64:
                return str(found["sha256"])
        digest = base_digest(directory)
        if _identity(directory) == seen:
            _keep(file, json.dumps({"files": seen, "sha256": digest}))
    return digest


def recall(directory: Path, kept: Path | None, subject: str) -> Any:
    """What `remember` kept of these very files under `subject`, or None."""
    if kept is None:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((kept / f"{name_of(directory)}.{subject}.json").read_bytes())
        if found["files"] == _identity(directory):
            return found["value"]
    return None


def remember(directory: Path, kept: Path | None, subject: str, value: object) -> None:
    """Keeps a finding about these very files for other processes, in a folder that nobody else may write to."""
    if kept is not None:
        content = json.dumps({"files": _identity(directory), "value": value})
        _keep(kept / f"{name_of(directory)}.{subject}.json", content)


def read_once(directory: Path, files: Sequence[Path], shared: Path | None = None) -> float:
    """Brings the files into the page cache, unless they are there: one process of this node reads while the others
    wait for it, and at most four nodes at once (those that share the folder `shared`). Returns the seconds taken."""
    began_mono_s = time.monotonic()
    if all(map(cached, files)):
        return time.monotonic() - began_mono_s
    with turn(node_folder(), f"read-{name_of(directory)}"):
        if not all(map(cached, files)):  # else another has read them
            with turn(shared, "cold-load", COLD_LOADS):
                read_ahead(files)
    return time.monotonic() - began_mono_s


def cached(file: Path) -> bool:
    """Whether samples of the file are all in the page cache. Never waits for a disk."""
    byte = bytearray(1)
    try:
        with open(file, "rb", buffering=0) as opened:
            fd, size = opened.fileno(), os.fstat(opened.fileno()).st_size
            samples = (*range(0, size, max(1, size // PROBES)), size - 1)
            return all(os.preadv(fd, [byte], at, os.RWF_NOWAIT) == 1 for at in samples)
    except OSError:  # not there, or a filesystem that does not tell
        return False


def read_ahead(files: Sequence[Path]) -> int:
    """Reads the files into the page cache, by several threads; the bytes read. A file that cannot be read is left to
    whoever needs it."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open(file, "rb", buffering=0)).fileno() for file in files if file.is_file()]
        chunks = [(fd, at) for fd in opened for at in range(0, os.fstat(fd).st_size, CHUNK)]
        with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
            return sum(pool.map(_read, chunks))


def _read(chunk: tuple[int, int]) -> int:
    descriptor, at = chunk
    os.posix_fadvise(descriptor, at, CHUNK, os.POSIX_FADV_WILLNEED)
    try:
        return os.preadv(descriptor, [_buffer()], at)
    except OSError as error:
        log.warning("cannot read ahead: %s", error)
        return 0


_threads = threading.local()


def _buffer() -> bytearray:
    if not hasattr(_threads, "buffer"):
        _threads.buffer = bytearray(CHUNK)
    found: bytearray = _threads.buffer
    return found


def _digested(directory: Path) -> list[Path]:
    return [directory / "config.json", *sorted(directory.glob("*.safetensors"))]


def _identity(directory: Path) -> list[list[str | int]]:
    found = ((file.name, file.stat()) for file in _digested(directory))
    return [[name, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns] for name, seen in found]


def _keep(file: Path, content: str) -> None:
    """Whole or not at all. A disk that refuses costs the next process a second."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent)
        with open(descriptor, "w", encoding="utf-8") as written:
            written.write(content)
        os.replace(name, file)
    except OSError as error:
        log.info("what was found out of a model is not kept: %s", error)

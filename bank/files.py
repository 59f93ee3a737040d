"""Files that are whole or absent, and private, on a filesystem that many nodes share."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Puts `data` at `path`, durably and whole or not at all, mode 0600; missing folders are made, mode 0700.

    Raises `OSError` when the disk does; then nothing was left behind."""
    make_private(path.parent)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)  # whatever the umask
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync(path.parent)


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file. Raises `ValueError` when there are more than `limit`, without reading them, and
    `OSError` for a symbolic link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise ValueError(f"{size} bytes, where at most {limit} are expected")
        return file.read(limit)


def make_private(directory: Path) -> None:
    """Makes the missing part of the path, each folder 0700 whatever the umask."""
    if directory.is_dir():
        return
    make_private(directory.parent)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        return
    directory.chmod(0o700)
    _sync(directory.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Writing a result folder as the user: whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from broker.protocol.errors import PromptTunerError, UsageError

_PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"


def check_folder(folder: Path) -> Path:
    """The real path of a folder that a result can be written to: not there yet, or empty, in a folder that is.

    Raises UsageError otherwise; called before a request is made, so that no result is without a place.
    """
    real = Path(os.path.realpath(folder))
    if not real.parent.is_dir():
        raise UsageError(f"{folder}: its parent folder does not exist", f"make it: mkdir -p {real.parent}")
    if not os.access(real.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{folder}: you may not write in {real.parent}", "choose another place")
    if real.is_dir():
        if any(real.iterdir()):
            raise UsageError(f"{folder}: is there already and not empty", "name a new folder; nothing is overwritten")
    elif real.exists():
        raise UsageError(f"{folder}: is there already and no folder", "name a new folder; nothing is overwritten")
    return real


def write_folder(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes `files` into `folder`, which appears complete, on disk, or does not appear.

    Raises UsageError if the folder has come to be meanwhile, PromptTunerError for a full disk or a name that is no
    plain file name (a broker never sends one).
    """
    real = check_folder(folder)
    for name in files:
        if not re.fullmatch(_PLAIN_NAME, name):
            raise PromptTunerError(f"the broker sent a file with the name {name[:80]!r}", "nothing was written")
    partial = real.parent / f".{real.name[:200]}.{os.urandom(6).hex()}"
    try:
        partial.mkdir()
        for name, content in files.items():
            _write(partial / name, content)
        _sync(partial)
        partial.rename(real)
        _sync(real.parent)
    except OSError as error:
        raise PromptTunerError(
            f"{folder}: cannot be written: {error.strerror}", "the broker keeps the result: fetch it later with ptfetch"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when all went well


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

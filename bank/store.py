"""The bank's files: prompts by digest, and beside them one small entry file for each publication.

    objects/<2 of digest>/<digest>.safetensors        one tensor, `prompt`, fp32 [virtual tokens, hidden size]
    bases/<base digest>/<virtual tokens>/<time>-<digest>.json

The entry file is the commit: it is renamed into place after its prompt is on disk, so that a reader never sees half an
entry. Its name sorts by age, so that the newest are found without opening the others. Files are never changed.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import msgspec
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from bank.entries import Entry, decode, encode
from bank.files import read_bounded, write_whole

_log = logging.getLogger(__name__)

_ENTRY_BYTES = 64 * 1024
_HEADER_BYTES = 4096  # more than safetensors needs for one tensor
_MAX_ABS = 1e4  # no prompt that trains well comes near
_LOOKED_AT = 512  # entry files opened in one lookup, however few of them the user may see

Prompt = NDArray[np.float32]


class DamagedEntry(Exception):
    """The prompt is not what its entry says: missing, cut short, altered, or not finite."""


class Bank:
    """The prompts under one directory, which is made on the first publication. Safe for many readers and writers on a
    shared filesystem."""

    def __init__(self, directory: Path) -> None:
        self._objects = directory / "objects"
        self._bases = directory / "bases"

    def publish(self, prompt: Prompt, entry: Entry) -> str:
        """Keeps `prompt` and then its entry, durably, and returns the prompt's digest. `entry.digest` is ignored.

        Raises `ValueError` for a prompt that `load` would refuse, `OSError` when the disk does."""
        prompt = np.ascontiguousarray(prompt, dtype=np.float32)
        _check(prompt, entry)
        data = safetensors.numpy.save({"prompt": prompt})
        digest = hashlib.sha256(data).hexdigest()
        _publish(self._object(digest), data)
        name = f"{int(entry.created_unix_s * 1e6):017d}-{digest}.json"
        kept = encode(msgspec.structs.replace(entry, digest=digest))
        _publish(self._entries(entry.base_digest, entry.virtual_tokens) / name, kept)
        return digest

    def recent(self, base_digest: str, virtual_tokens: int, uid: int, account: str, limit: int) -> list[Entry]:
        """The newest converged prompts of this base and length that the user may start from, newest first, each digest
        once. Damaged entries are passed over; an unreadable bank is an empty one."""
        directory = self._entries(base_digest, virtual_tokens)
        try:
            names = sorted((name for name in os.listdir(directory) if name.endswith(".json")), reverse=True)
        except OSError:
            return []
        found: dict[str, Entry] = {}
        for name in names[:_LOOKED_AT]:
            entry = _read_entry(directory / name)
            if entry is None or (entry.base_digest, entry.virtual_tokens) != (base_digest, virtual_tokens):
                continue
            if entry.converged and entry.visible_to(uid, account):
                found.setdefault(entry.digest, entry)
            if len(found) == limit:
                break
        return list(found.values())

    def load(self, entry: Entry) -> Prompt:
        """The prompt of `entry`, after its size, digest, shape, type and values were checked.

        Raises `DamagedEntry`, and nothing else."""
        expected = entry.virtual_tokens * entry.hidden_size * 4
        try:
            data = read_bounded(self._object(entry.digest), expected + _HEADER_BYTES)
            if hashlib.sha256(data).hexdigest() != entry.digest:
                raise DamagedEntry(f"bank prompt {entry.digest[:12]} does not match its digest")
            tensors = safetensors.numpy.load(data)
            if list(tensors) != ["prompt"]:
                raise DamagedEntry(f"bank prompt {entry.digest[:12]} holds {sorted(tensors)}, not one prompt")
            _check(tensors["prompt"], entry)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DamagedEntry(f"bank prompt {entry.digest[:12]}: {error}") from None
        return tensors["prompt"]

    def _object(self, digest: str) -> Path:
        return self._objects / digest[:2] / f"{digest}.safetensors"

    def _entries(self, base_digest: str, virtual_tokens: int) -> Path:
        return self._bases / base_digest / str(virtual_tokens)


def _check(prompt: Prompt, entry: Entry) -> None:
    if prompt.dtype != np.float32:
        raise ValueError(f"its type is {prompt.dtype}, not float32")
    if prompt.shape != (entry.virtual_tokens, entry.hidden_size):
        raise ValueError(f"its shape is {prompt.shape}, not {(entry.virtual_tokens, entry.hidden_size)}")
    if not np.isfinite(prompt).all():
        raise ValueError("it has values that are not finite")
    if float(np.abs(prompt).max()) > _MAX_ABS:
        raise ValueError(f"it has values beyond {_MAX_ABS:g}")


def _read_entry(path: Path) -> Entry | None:
    try:
        return decode(read_bounded(path, _ENTRY_BYTES))
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        _log.warning("bank entry %s passed over: %s", path.name, error)
        return None


def _publish(path: Path, data: bytes) -> None:
    """Writes what is not there yet; a damaged file of that name is replaced."""
    try:
        if read_bounded(path, len(data)) == data:
            return
    except (OSError, ValueError):
        pass
    write_whole(path, data)

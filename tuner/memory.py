"""How many tokens one forward and backward pass may hold: known when the model is loaded, before any request joins."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from tuner import packing
from tuner.data import Example
from tuner.model import Base
from tuner.start import random_prompt

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Numbers of hidden size that autograd keeps of one token in one layer, frozen weights and fused attention: measured.
_KEPT_A_LAYER = 14.4
_PAIR_BYTES = 5  # of the attention mask, for each query and key of a row
_USABLE = {"cpu": 0.5, "cuda": 0.8}  # of what is free: on a CPU others have their share of it
_ALLOCATOR_WORDS = ("can't allocate memory", "out of memory", "not enough memory")
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(slots=True)
class Budget:
    """What a token takes in a pass, and how many a pass may have; fewer when that proves to be too many."""

    bytes_per_token: float
    max_tokens: int

    @classmethod
    def of(cls, base: Base) -> Budget:
        """By measurement on a GPU, by formula on a CPU, where nothing counts a pass's bytes."""
        per_token = _measured(base) if base.device.type == "cuda" else _estimated(base)
        return cls(per_token, max(1, int(usable_bytes(base.device) / per_token)))

    def row_bytes(self, tokens: int) -> float:
        """What a row takes by itself, its virtual tokens counted."""
        return tokens * self.bytes_per_token + tokens**2 * _PAIR_BYTES

    def within(self, work: Callable[[int], T], largest: Callable[[int], int]) -> T:
        """What `work` returns, given the most tokens of a pass: fewer and fewer of them, for as long as the memory runs
        out and `largest` (the tokens of the largest pass that can still be split, or 0) says that fewer may help.

        Raises the last out-of-memory error (`is_out_of_memory` knows them)."""
        while True:
            try:
                return work(self.max_tokens)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                splittable = largest(self.max_tokens)
                if not splittable:
                    raise
            # Outside of the handler, whose error holds on to the tensors of the pass that failed.
            release_memory()
            self.max_tokens = max(1, min(self.max_tokens, splittable) // 2)
            _log.warning("out of memory: passes have at most %d tokens from here on", self.max_tokens)


def usable_bytes(device: torch.device) -> float:
    """The share of the memory that is free now that training may take."""
    return _USABLE.get(device.type, 0.5) * _free_bytes(device)


def bytes_per_request(base: Base, virtual_tokens: int) -> float:
    """What a request holds beside its rows: prompt, best prompt, moments, gradient; its keys and values, and theirs."""
    states = 5 * virtual_tokens * base.hidden_size * 4
    return states + 4 * base.layers * virtual_tokens * base.hidden_size * base.dtype.itemsize


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATOR_WORDS)


def release_memory() -> None:
    """Gives cached GPU memory back after an allocation failed."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _estimated(base: Base) -> float:
    return _KEPT_A_LAYER * base.hidden_size * base.layers * base.dtype.itemsize


def _measured(base: Base) -> float:
    """The difference that more tokens make to the allocator's peak."""
    prompt = random_prompt(base, 1, 0)
    length = max(2, min(64, base.positions - 1))
    peaks = []
    for count in (2, 18):
        rows = [(0, Example((0,) * length, 1))] * count
        torch.cuda.reset_peak_memory_stats(base.device)
        before = torch.cuda.memory_allocated(base.device)
        packing.gradient(base, [prompt], rows)
        peaks.append(torch.cuda.max_memory_allocated(base.device) - before)
    return max((peaks[1] - peaks[0]) / (16 * length), _estimated(base) / 4)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([_available_bytes(), *_cgroup_room_bytes()])


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo does not say how much memory is available")


def _cgroup_room_bytes() -> list[int]:
    """What the limits above this process, a Slurm job's among them, still leave to it."""
    try:
        own = next(line[3:] for line in _OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    group, rooms = _CGROUPS / own.lstrip("/"), []
    while group.is_relative_to(_CGROUPS) and group != _CGROUPS:
        try:
            limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # Pages of files count as used, and are given back when asked for.
            rooms.append(max(0, limit - used + int(counts["active_file"]) + int(counts["inactive_file"])))
        except (OSError, ValueError, KeyError):  # no such controller, or no limit: "max"
            pass
        group = group.parent
    return rooms

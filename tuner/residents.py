"""The base models of one worker: read beside training, kept on the device while there is room, else on the host."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.protocol.errors import ConfigError

if TYPE_CHECKING:
    from tuner.model import Base

_log = logging.getLogger(__name__)

Load = Callable[[str, bool], "tuple[Base, dict[str, float]]"]  # a path, and whether another thread trains


@dataclass(slots=True)
class Resident:
    """One loaded model. `phases_s` times its load and its last swap."""

    base: Base
    phases_s: dict[str, float]
    used_mono_s: float


class Residents:
    """Loads models by name and swaps them. Driven by one thread, that which trains; reading happens in others.

    Withdrawn models stay on the host: their weights are the mapped files, so that it is the kernel's page cache which
    forgets the longest unused one when memory is short."""

    def __init__(self, paths: Mapping[str, str], load: Load, room_bytes: Callable[[], int]) -> None:
        """`room_bytes` is asked for what the models' weights may take of the device."""
        self._paths = paths
        self._load = load
        self._room_bytes = room_bytes
        self._loading: dict[str, Future[tuple[Base, dict[str, float]]]] = {}
        self._residents: dict[str, Resident] = {}

    @property
    def names(self) -> list[str]:
        """The loaded models, the last used one first."""
        return sorted(self._residents, key=lambda name: -self._residents[name].used_mono_s)

    @property
    def pending(self) -> list[str]:
        """The models whose load has begun and whose end was not asked for yet."""
        return list(self._loading)

    def __getitem__(self, name: str) -> Resident:
        return self._residents[name]

    def load(self, name: str) -> Resident:
        """Loads the model in this thread, unless it is loaded. Raises `ConfigError`."""
        if name not in self._residents:
            self._add(name, *self._load(self._path(name), False))
        return self._residents[name]

    def begin(self, name: str) -> None:
        """Begins to load the model beside whatever this thread does, unless that was done. Raises `ConfigError`."""
        if name in self._residents or name in self._loading:
            return
        future: Future[tuple[Base, dict[str, float]]] = Future()
        self._loading[name] = future
        path = self._path(name)

        def run() -> None:
            try:
                future.set_result(self._load(path, True))
            except BaseException as error:  # for the thread that asks
                future.set_exception(error)

        threading.Thread(target=run, name="load", daemon=True).start()

    def ready(self, name: str) -> bool:
        """Whether the model is loaded now. Raises `ConfigError` once, when it cannot be loaded."""
        future = self._loading.get(name)
        if future is None or not future.done():
            return name in self._residents
        del self._loading[name]
        from tuner.model import Disturbing

        try:
            self._add(name, *future.result())
        except Disturbing:
            _log.info("model %s is loaded by this thread: no request trains meanwhile", name)
            for other in self._residents:
                self.withdraw(other)
            self.load(name)
        return True

    def wait(self, limit_s: float) -> None:
        """Returns as soon as a load is over, or after `limit_s`."""
        wait_for(list(self._loading.values()), timeout=limit_s, return_when="FIRST_COMPLETED")

    def placed(self, name: str) -> bool:
        """Whether the model can compute at once."""
        return self._residents[name].base.weights.placed

    def use(self, name: str) -> Base:
        """The model, on its device: in place of those unused for the longest time, if there is no room beside them."""
        resident = self._residents[name]
        resident.used_mono_s = time.monotonic()
        if not resident.base.weights.placed:
            self._make_room(name)
            resident.phases_s["swap"] = resident.base.weights.place()
        return resident.base

    def withdraw(self, name: str) -> None:
        """Frees what the model takes of the device."""
        self._residents[name].base.weights.withdraw()

    def _make_room(self, name: str) -> None:
        room = self._room_bytes() - self._residents[name].base.weights.device_bytes
        others = [self._residents[other].base.weights for other in self.names if other != name]
        for weights in others:  # the last used ones stay, as many as there is room for
            if weights.placed and weights.device_bytes:
                room -= weights.device_bytes
                if room < 0:
                    weights.withdraw()

    def _add(self, name: str, base: Base, phases_s: dict[str, float]) -> None:
        self._residents[name] = Resident(base, phases_s, time.monotonic())

    def _path(self, name: str) -> str:
        if name not in self._paths:
            raise ConfigError(f"this worker holds no model {name}", f"it may hold {', '.join(self._paths)}")
        return self._paths[name]


def room_bytes() -> int:
    """Half of the device's memory: the rest is for training."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1] // 2
    with open("/proc/meminfo", encoding="ascii") as lines:
        total_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal:"))
    return total_kib * 1024 // 2

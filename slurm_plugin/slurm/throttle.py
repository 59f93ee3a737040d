"""A token bucket over all calls to Slurm: its controller serves a whole cluster, and we are one of its many users."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Throttle:
    """Lets through `burst` calls at once and `calls_per_s` sustained: in any window of w seconds at most
    burst + calls_per_s * w calls. Safe for threads; calls pass in the order of arrival."""

    def __init__(
        self,
        calls_per_s: float,
        burst: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if calls_per_s <= 0 or burst < 1:
            raise ValueError(f"calls_per_s must be > 0 and burst >= 1, not {calls_per_s} and {burst}")
        self._interval_s = 1.0 / calls_per_s
        self._head_start_s = (burst - 1) * self._interval_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        # When the bucket will be full again. One number holds the whole state of the bucket.
        self._full_mono_s = float("-inf")

    def take(self) -> float:
        """Takes one token, sleeping until there is one. Returns the seconds waited."""
        with self._lock:
            asked_mono_s = self._clock()
            self._full_mono_s = max(self._full_mono_s, asked_mono_s)
            start_mono_s = self._full_mono_s - self._head_start_s
            self._full_mono_s += self._interval_s
        now_mono_s = asked_mono_s
        while now_mono_s < start_mono_s:
            self._sleep(start_mono_s - now_mono_s)
            now_mono_s = self._clock()
        return now_mono_s - asked_mono_s

"""The token bucket: never above its rate."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm_plugin.slurm.throttle import Throttle


class Clock:
    """A clock that only sleeping and `tick` move."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds


@given(
    rate=st.floats(0.05, 100),
    burst=st.integers(1, 20),
    pauses_s=st.lists(st.floats(0, 30), min_size=1, max_size=80),
)
def test_any_window_holds_at_most_burst_plus_rate_times_its_length(
    rate: float, burst: int, pauses_s: list[float]
) -> None:
    clock = Clock()
    throttle = Throttle(rate, burst, clock, clock.sleep)
    calls = []
    for pause_s in pauses_s:
        clock.now_s += pause_s
        throttle.take()
        calls.append(clock.now_s)
    for first in range(len(calls)):
        for last in range(first, len(calls)):
            assert last - first + 1 <= burst + rate * (calls[last] - calls[first]) + 1e-6


@given(rate=st.floats(0.05, 100), burst=st.integers(1, 20))
def test_a_full_bucket_lets_its_burst_through_without_waiting_and_then_keeps_the_rate(rate: float, burst: int) -> None:
    clock = Clock()
    throttle = Throttle(rate, burst, clock, clock.sleep)
    assert [throttle.take() for _ in range(burst)] == pytest.approx([0.0] * burst, abs=1e-6)
    assert throttle.take() == pytest.approx(1 / rate, abs=1e-6)


def test_a_sleep_that_returns_early_is_slept_again() -> None:
    clock = Clock()
    throttle = Throttle(1.0, 1, clock, lambda seconds: clock.sleep(min(seconds, 0.1)))
    throttle.take()
    assert throttle.take() == pytest.approx(1.0)


def test_threads_share_one_bucket() -> None:
    throttle = Throttle(1000.0, 5)
    waits: list[float] = []
    threads = [threading.Thread(target=lambda: waits.append(throttle.take())) for _ in range(40)]
    before_mono_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(waits) == 40
    assert time.monotonic() - before_mono_s >= (40 - 5) / 1000.0


@pytest.mark.parametrize(("rate", "burst"), [(0.0, 1), (-1.0, 1), (1.0, 0)])
def test_a_bucket_that_could_never_let_anything_through_is_refused(rate: float, burst: int) -> None:
    with pytest.raises(ValueError, match="calls_per_s"):
        Throttle(rate, burst)

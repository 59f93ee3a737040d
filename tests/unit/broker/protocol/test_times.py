"""Durations and instants: every form of Slurm's grammar, and what is no time at all."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol.errors import UsageError
from broker.protocol.times import (
    MAX_DURATION_S,
    format_duration,
    format_instant,
    format_rfc3339,
    parse_duration,
    parse_instant,
)


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process in New York (whose clocks change), given back as it was."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield monkeypatch
    monkeypatch.undo()
    time.tzset()


def _utc(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("5:30", 330),
        ("1:02:03", 3723),
        ("00:90:00", 5400),
        ("1-2", 93600),
        ("1-2:3", 93780),
        ("1-2:3:4", 93784),
        ("90s", 90),
        ("1h30m", 5400),
        ("1H 30M", 5400),
        ("2 minutes", 120),
        ("1w", 604800),
        ("0.5s", 0.5),
        ("1.5h", 5400),
        ("0s", 0),
        (" 10 ", 600),
        ("0", math.inf),
        ("UNLIMITED", math.inf),
        ("infinite", math.inf),
    ],
)
def test_every_form_of_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "x", "-5", "1:2:3:4", "1-", "-1-2", "1h1h", "1m1h", "30 q", "1e3", "nan", "inf", "٣", "1\x00", "9" * 50],
)
def test_what_is_no_duration_is_refused_with_the_forms_that_are(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_duration(text)
    assert caught.value.exit_code == 2
    assert caught.value.hint


@given(st.integers(0, int(MAX_DURATION_S)))
def test_a_formatted_duration_reads_back_the_same(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(1, 10**9), st.sampled_from(["s", "m", "h", "d", "w"]))
def test_units_scale(count: int, unit: str) -> None:
    size = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[unit]
    if count * size <= MAX_DURATION_S:
        assert parse_duration(f"{count}{unit}") == count * size
    else:
        with pytest.raises(UsageError, match="too long"):
            parse_duration(f"{count}{unit}")


@given(st.text(max_size=30))
def test_any_text_is_a_duration_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_duration(text) >= 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00:00"),
        (59.9, "00:00:59"),
        (3723, "01:02:03"),
        (93784, "1-02:03:04"),
        (-3723, "-01:02:03"),
        (-0.5, "00:00:00"),
        (math.inf, "UNLIMITED"),
    ],
)
def test_durations_are_written_as_slurm_writes_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


NOW = _utc("2026-03-10T15:00:00")  # 11:00 in New York, daylight saving time since two days


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("11:00", "2026-03-10T15:00:00"),
        ("12:30", "2026-03-10T16:30:00"),
        ("10:59:59", "2026-03-11T14:59:59"),
        ("4:30 PM", "2026-03-10T20:30:00"),
        ("4:30pm", "2026-03-10T20:30:00"),
        ("12:00 am", "2026-03-11T04:00:00"),
        ("1225", "2026-12-25T05:00:00"),
        ("0101", "2027-01-01T05:00:00"),
        ("122527", "2027-12-25T05:00:00"),
        ("12/25", "2026-12-25T05:00:00"),
        ("12/25/2027", "2027-12-25T05:00:00"),
        ("12.25.27", "2027-12-25T05:00:00"),
        ("7/4-10:00", "2026-07-04T14:00:00"),
        ("07/04/26-10:00:05", "2026-07-04T14:00:05"),
        ("2026-07-04", "2026-07-04T04:00:00"),
        ("2026-07-04T10:00", "2026-07-04T14:00:00"),
        ("2026-07-04 10:00:30", "2026-07-04T14:00:30"),
        ("2026-07-04T10:00:00Z", "2026-07-04T10:00:00"),
        ("2026-07-04T10:00:00.250+02:00", "2026-07-04T08:00:00.250"),
        ("now", "2026-03-10T15:00:00"),
        ("now+90", "2026-03-10T15:01:30"),
        ("NOW + 2 hours", "2026-03-10T17:00:00"),
        ("now+1week", "2026-03-17T15:00:00"),
        ("now-1day", "2026-03-09T15:00:00"),
        ("today", "2026-03-10T04:00:00"),
        ("tomorrow", "2026-03-11T04:00:00"),
        ("tomorrow noon", "2026-03-11T16:00:00"),
        ("midnight", "2026-03-11T04:00:00"),
        ("noon", "2026-03-10T16:00:00"),
        ("elevenses", "2026-03-10T15:00:00"),
        ("fika", "2026-03-10T19:00:00"),
        ("teatime", "2026-03-10T20:00:00"),
    ],
)
def test_every_form_of_an_instant_is_read_in_local_time(zone: object, text: str, utc: str) -> None:
    assert parse_instant(text, NOW) == _utc(utc)


def test_accounting_reads_a_bare_time_or_date_as_the_last_one(zone: object) -> None:
    assert parse_instant("12:30", NOW, past=True) == _utc("2026-03-09T16:30:00")
    assert parse_instant("1225", NOW, past=True) == _utc("2025-12-25T05:00:00")
    assert parse_instant("0310", NOW, past=True) == _utc("2026-03-10T04:00:00")


def test_the_next_day_is_a_calendar_day_even_when_the_clocks_change(zone: object) -> None:
    before = _utc("2026-03-07T20:00:00")  # 15:00 in New York, the day before the change
    assert parse_instant("14:00", before) == _utc("2026-03-08T18:00:00")  # 22 hours later, not 23


def test_the_hour_that_comes_twice_is_never_read_as_past(zone: object) -> None:
    between = _utc("2026-11-01T05:45:00")  # 01:45 for the first time; 01:30 comes again in 45 minutes
    assert parse_instant("01:30", between) == _utc("2026-11-01T06:30:00")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "foo",
        "25:00",
        "13:00 pm",
        "0:30 am",
        "10:60",
        "2026-02-30",
        "13/01",
        "0231",
        "12.25/26",
        "2026-12-25T",
        "12/25-",
        "now+5parsecs",
        "now+9999999999weeks",
        "10:00 foo",
        "tomorrow foo",
        "2026-07-04T10:00:00+99:00",
        "9" * 40,
        "1\x000:00",
    ],
)
def test_what_is_no_instant_is_refused_with_the_forms_that_are(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_instant(text, NOW)
    assert caught.value.hint


@given(st.text(max_size=30))
def test_any_text_is_an_instant_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        parse_instant(text, NOW)


@given(st.integers(86400, 32_000_000_000))
def test_a_formatted_instant_reads_back_the_same(unix_s: int) -> None:
    text = format_instant(unix_s)
    read = parse_instant(text, NOW)
    assert format_instant(read) == text  # an hour that comes twice has one text
    assert abs(read - unix_s) in (0, 3600)


@given(st.integers(0, 32_000_000_000))
def test_an_rfc3339_instant_reads_back_exactly(unix_s: int) -> None:
    assert parse_instant(format_rfc3339(unix_s), NOW) == unix_s


def test_an_instant_that_is_not_there_yet_has_slurms_word_for_it() -> None:
    assert format_instant(None) == format_instant(0) == format_instant(math.inf) == "Unknown"
    assert format_instant(0, "N/A") == "N/A"

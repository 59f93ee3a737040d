"""Slurm's time grammar: durations and instants, read and written. The clock is an argument, the zone the process's."""

from __future__ import annotations

import math
import re
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day

from broker.protocol.errors import UsageError

MAX_DURATION_S = 100 * 366 * 86400.0

_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_UNIT_NAMES = {
    "s": ("s", "sec", "secs", "second", "seconds"),
    "m": ("m", "min", "mins", "minute", "minutes"),
    "h": ("h", "hr", "hrs", "hour", "hours"),
    "d": ("d", "day", "days"),
    "w": ("w", "week", "weeks"),
}
_UNITS = {name: _UNIT_S[unit] for unit, names in _UNIT_NAMES.items() for name in names}

# Patterns are text: `re` keeps what it compiled, and a command that reads no time compiles none.
_CLOCK_DURATION = r"(?:([0-9]{1,10})-)?([0-9]{1,10})(?::([0-9]{1,10}))?(?::([0-9]{1,10}))?"
_UNIT_DURATION = r"(?:[0-9]{1,10}(?:\.[0-9]{1,6})?\s*[a-z]+\s*)+"
_UNIT_PART = r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)"
_DURATION_FORMS = "write M, M:S, H:M:S, D-H, D-H:M, D-H:M:S (a bare number is minutes), 90s, 1h30m or UNLIMITED"

_NOW = r"now(?:\s*([+-])\s*([0-9]{1,10})\s*([a-z]*))?"
_RFC3339 = r"[0-9]{4}-[0-9]{2}-[0-9]{2}[t ][0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,6})?)?(?:z|[+-][0-9]{2}:[0-9]{2})"
_TIME = r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?\s*([ap]m)?"
_ISO_DATE = r"([0-9]{4})-([0-9]{1,2})-([0-9]{1,2})"
_US_DATE = r"([0-9]{1,2})([/.])([0-9]{1,2})(?:\2([0-9]{4}|[0-9]{2}))?"
_PACKED_DATE = r"([0-9]{2})([0-9]{2})([0-9]{2})?"
_NAMED_TIMES = {"midnight": 0, "elevenses": 11, "noon": 12, "fika": 15, "teatime": 16}
_INSTANT_FORMS = (
    "write HH:MM[:SS] [AM|PM], MMDD[YY], MM/DD[/YY][-HH:MM[:SS]], YYYY-MM-DD[THH:MM[:SS]], now[+N[seconds|minutes|"
    "hours|days|weeks]], today, tomorrow, midnight, noon, elevenses, fika or teatime"
)


def parse_duration(text: str) -> float:
    """Seconds in `text`; `math.inf` for `0`, `UNLIMITED` and `INFINITE`, as Slurm's time limits have it.

    A bare number is minutes; a number with a unit letter (`90s`, `1h30m`, `0.5s`) is what it says, so `0s` is zero.
    Raises UsageError for anything else, negative values and more than a hundred years.
    """
    words = text.strip().lower()
    if words in ("0", "unlimited", "infinite"):
        return math.inf
    seconds = _clock_duration_s(words)
    if seconds is None:
        seconds = _unit_duration_s(words)
    if seconds is None:
        raise UsageError(f"not a duration: {_shown(text)}", _DURATION_FORMS)
    if seconds > MAX_DURATION_S:
        raise UsageError(f"duration too long: {_shown(text)}", "the longest is 100 years; UNLIMITED has no end")
    return seconds


def _clock_duration_s(words: str) -> float | None:
    match = re.fullmatch(_CLOCK_DURATION, words)
    if match is None:
        return None
    days, first, second, third = match.groups()
    numbers = [int(first), int(second or 0), int(third or 0)]
    if days is not None or third is not None:  # D-H[:M[:S]] and H:M:S
        hours, minutes, seconds = numbers
    else:  # M and M:S
        hours, minutes, seconds = 0, numbers[0], numbers[1]
    return float(int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds)


def _unit_duration_s(words: str) -> float | None:
    if re.fullmatch(_UNIT_DURATION, words) is None:
        return None
    total, last_unit_s = 0.0, math.inf
    for number, unit in re.findall(_UNIT_PART, words):
        unit_s = _UNITS.get(unit)
        if unit_s is None or unit_s >= last_unit_s:  # unknown, repeated, or in the wrong order
            return None
        total += float(number) * unit_s
        last_unit_s = unit_s
    return total


def format_duration(seconds: float) -> str:
    """`[D-]HH:MM:SS`, whole seconds (rounded down), a leading minus for negative ones, `UNLIMITED` for infinity."""
    if math.isinf(seconds):
        return "UNLIMITED"
    whole = int(seconds)
    sign = ""
    if whole < 0:
        sign, whole = "-", -whole
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if hours < 24:
        return f"{sign}{hours:02d}:{minute:02d}:{second:02d}"
    return f"{sign}{hours // 24}-{hours % 24:02d}:{minute:02d}:{second:02d}"


def parse_instant(text: str, now_unix_s: float, *, past: bool = False) -> float:
    """Epoch seconds of `text`, in local time where it names no zone.

    A time of day alone is its next occurrence, a date without a year the next such date; with `past` (start times of
    accounting) the last one. Days are calendar days, so a change of daylight saving time does not shift the wall clock.
    Raises UsageError when `text` is no instant or no date of the calendar.
    """
    words = " ".join(text.split()).lower()
    try:
        if match := re.fullmatch(_NOW, words):
            return now_unix_s + _now_offset_s(match, text)
        if re.fullmatch(_RFC3339, words):
            return datetime.fromisoformat(words.upper()).timestamp()
        return _local_instant_s(words, text, datetime.fromtimestamp(now_unix_s), past)
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(f"no such time: {_shown(text)}: {error}", _INSTANT_FORMS) from None


def _now_offset_s(match: re.Match[str], text: str) -> float:
    sign, count, unit = match.groups()
    if count is None:
        return 0.0
    unit_s = _UNITS.get(unit or "s")
    if unit_s is None:
        raise UsageError(f"unknown unit {unit!r} in {_shown(text)}", _INSTANT_FORMS)
    offset_s = float(int(count) * unit_s)
    if offset_s > MAX_DURATION_S:
        raise UsageError(f"too far away: {_shown(text)}", "the longest offset is 100 years")
    return -offset_s if sign == "-" else offset_s


def _local_instant_s(words: str, text: str, now: datetime, past: bool) -> float:
    date_words, time_words = _split(words)
    clock = _time_of_day(time_words) if time_words else time_of_day()
    if clock is None or not words:
        raise UsageError(f"not a time: {_shown(text)}", _INSTANT_FORMS)
    if not date_words:
        return _nearest_s(clock, now, past)
    day = _date(date_words, now.date(), past)
    if day is None:
        raise UsageError(f"not a time: {_shown(text)}", _INSTANT_FORMS)
    return datetime.combine(day, clock).timestamp()


def _split(words: str) -> tuple[str, str]:
    """The date's words and the time's words; either may be empty."""
    if re.match(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}t", words):
        day, _, clock = words.partition("t")
        return day, clock or "?"
    if "/" in words and "-" in words:
        day, _, clock = words.partition("-")
        return day, clock or "?"
    if _time_of_day(words) is not None or ":" in words.partition(" ")[0]:
        return "", words
    day, _, clock = words.partition(" ")
    return day, clock


def _time_of_day(words: str) -> time_of_day | None:
    if words in _NAMED_TIMES:
        return time_of_day(_NAMED_TIMES[words])
    match = re.fullmatch(_TIME, words)
    if match is None:
        return None
    hour, minute, second = int(match[1]), int(match[2]), int(match[3] or 0)
    if match[4]:
        if not 1 <= hour <= 12:
            raise ValueError("with AM or PM the hour is 1..12")
        hour = hour % 12 + (12 if match[4] == "pm" else 0)
    return time_of_day(hour, minute, second)


def _date(words: str, today: date, past: bool) -> date | None:
    if words == "today":
        return today
    if words == "tomorrow":
        return today + timedelta(days=1)
    if match := re.fullmatch(_ISO_DATE, words):
        return date(int(match[1]), int(match[2]), int(match[3]))
    if match := re.fullmatch(_US_DATE, words):
        return _with_year(int(match[1]), int(match[3]), match[4], today, past)
    if match := re.fullmatch(_PACKED_DATE, words):
        return _with_year(int(match[1]), int(match[2]), match[3], today, past)
    return None


def _with_year(month: int, day: int, year: str | None, today: date, past: bool) -> date:
    if year is not None:
        return date(int(year) if len(year) == 4 else 2000 + int(year), month, day)
    found = date(today.year, month, day)
    if past and found > today:
        return date(today.year - 1, month, day)
    if not past and found < today:
        return date(today.year + 1, month, day)
    return found


def _nearest_s(clock: time_of_day, now: datetime, past: bool) -> float:
    """The first instant with this wall clock that is not before now (with `past`: the last one not after it). In the
    hour that is there twice when daylight saving time ends, both instants are looked at."""
    now_s = now.timestamp()
    days = (0, -1, -2) if past else (0, 1, 2)
    for offset in days:
        wall = datetime.combine(now.date() + timedelta(days=offset), clock)
        instants = [wall.timestamp(), wall.replace(fold=1).timestamp()]
        for instant in sorted(instants, reverse=past):
            if instant <= now_s if past else instant >= now_s:
                return instant
    raise ValueError("it never comes")


def format_instant(unix_s: float | None, missing: str = "Unknown") -> str:
    """`YYYY-MM-DDTHH:MM:SS` in local time; `missing` (`Unknown`, `N/A`, as Slurm prints) for None, 0 and infinity."""
    if not unix_s or math.isinf(unix_s):
        return missing
    return datetime.fromtimestamp(int(unix_s)).isoformat()


def format_rfc3339(unix_s: float) -> str:
    """`YYYY-MM-DDTHH:MM:SSZ`: for logs and files that travel between zones."""
    return datetime.fromtimestamp(int(unix_s), UTC).isoformat().replace("+00:00", "Z")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")

"""Reading what Slurm's commands print: delimited text whose lines may be cut, broken, or longer than expected.

Commands run with TZ=UTC, so every time that they print is UTC."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime

from msgspec import Struct

from broker.protocol.errors import SlurmUnavailable

# Each line of a listing begins and ends with a mark, so that a cut or foreign line is told from a whole one.
MARK = "pt1"
QUEUE_FORMAT = f"{MARK}|%A|%T|%r|%N|%S|%e|%j|%k|{MARK}"
QUEUE_FIELDS = 8
HISTORY_FIELDS = ("JobIDRaw", "State", "ExitCode", "Start", "End", "NodeList", "JobName")

PENDING_STATES = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
ENDED_STATES = frozenset(
    [
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
        *("PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
    ]
)


class QueueRow(Struct, frozen=True):
    """One job as squeue shows it. Times are epoch seconds, 0 for none."""

    job_id: str
    state: str
    reason: str
    node: str
    start_unix_s: float
    end_unix_s: float
    name: str
    comment: str


class HistoryRow(Struct, frozen=True):
    """One job as sacct shows it. `state` is its first word: `CANCELLED by 1001` is CANCELLED."""

    job_id: str
    state: str
    exit_code: str
    start_unix_s: float
    end_unix_s: float
    node: str
    name: str


def decode(raw: bytes) -> str:
    """Text of a command's output; bytes that are not UTF-8 become U+FFFD."""
    return raw.decode("utf-8", "replace")


def queue_rows(text: str) -> list[QueueRow]:
    """The jobs of a squeue listing in QUEUE_FORMAT. Lines that are not ours (a comment with a line break in it, a stray
    warning) are passed over.

    Raises SlurmUnavailable if the listing is no listing or its end is missing: what is absent from it is then unknown,
    not gone."""
    lines = text.split("\n")
    whole = text.endswith("\n") and lines[-2].endswith(f"|{MARK}")
    if text.strip() and not whole:
        raise SlurmUnavailable(f"squeue's listing is cut off after {len(text)} characters", "it is asked again later")
    rows = []
    for line in lines:
        fields = line.split("|", QUEUE_FIELDS)
        if len(fields) != QUEUE_FIELDS + 1 or fields[0] != MARK or not line.endswith(f"|{MARK}"):
            continue
        if re.fullmatch("[0-9]+", fields[1]) is None:
            continue
        _, job_id, state, reason, node, start, end, name, rest = fields
        comment = rest[: -len(MARK) - 1]
        rows.append(QueueRow(job_id, state, reason, node, unix_s(start), unix_s(end), name, comment))
    return rows


def history_rows(text: str) -> list[HistoryRow]:
    """The jobs of `sacct --parsable2 --noheader --format=HISTORY_FIELDS`; lines that are not such are passed over."""
    rows = []
    for line in text.splitlines():
        fields = line.split("|", len(HISTORY_FIELDS) - 1)
        if len(fields) != len(HISTORY_FIELDS) or re.fullmatch("[0-9]+", fields[0]) is None or not fields[1]:
            continue
        job_id, state, exit_code, start, end, node, name = fields
        rows.append(HistoryRow(job_id, state.split()[0], exit_code, unix_s(start), unix_s(end), node, name))
    return rows


def submitted_id(text: str) -> str | None:
    """The job id that `sbatch --parsable` printed (`57`, or `57;cluster`), None if it printed none."""
    match = re.search(r"^([0-9]{1,10})(?:;[^\s;]+)?\s*$", text, re.MULTILINE)
    return match[1] if match else None


def unix_s(text: str) -> float:
    """Epoch seconds of a UTC time as Slurm prints it; 0 for `Unknown`, `None`, `N/A`, nothing, and what is no time."""
    try:
        return datetime.strptime(text.strip(), "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return 0.0


_TRES_SCALE = {"": 1.0, "K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2, "P": 1024.0**3}


def tres(text: str) -> dict[str, float]:
    """Trackable resources: `cpu=4,mem=2G,gres/gpu=1`. Memory in MiB, the rest counts. Malformed parts are skipped."""
    found = {}
    for part in text.split(","):
        match = re.fullmatch(r"([A-Za-z0-9_/:.-]+)=([0-9]+(?:\.[0-9]+)?)([KMGTP]?)n?", part.strip())
        if match:
            scale = _TRES_SCALE[match[3]] if match[1] == "mem" else 1.0
            found[match[1]] = float(match[2]) * scale
    return found


def records(text: str) -> Iterator[dict[str, str]]:
    """The `Key=Value ...` lines of `scontrol --oneliner show`; a value may hold spaces up to the next key."""
    for line in text.splitlines():
        pairs = re.findall(r"(?:^|\s)([A-Za-z][A-Za-z0-9_:/]*)=(.*?)(?=\s+[A-Za-z][A-Za-z0-9_:/]*=|\s*$)", line)
        if pairs:
            yield dict(pairs)


def settings(text: str) -> dict[str, str]:
    """The `Key = Value` lines of `scontrol show config`."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}

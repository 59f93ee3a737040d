"""What `ptqueue` and `ptacct` can show of a request: each field once, with its names, width and text."""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any

from broker.protocol.rows import RequestRow
from broker.protocol.states import RequestState
from broker.protocol.times import format_duration, format_instant
from slurm_plugin.cli.table import Field

_ORDER = {state: place for place, state in enumerate(RequestState)}
_PENDING, _RUNNING = RequestState.PENDING, RequestState.RUNNING
_SHORT = {state: state.short for state in RequestState}
_LONG = {state: state.value for state in RequestState}


def instant(unix_s: float, missing: str = "N/A") -> str:
    """A time as `$SLURM_TIME_FORMAT` wants it: `standard`, `relative`, or strftime's directives."""
    style = os.environ.get("SLURM_TIME_FORMAT", "standard")
    if style == "standard" or not unix_s:
        return format_instant(unix_s, missing)
    moment = datetime.fromtimestamp(unix_s)
    if style != "relative":
        return moment.strftime(style)
    days = (moment.date() - datetime.now().date()).days
    near = {-1: "Ystday ", 0: "", 1: "Tomorr "}.get(days)
    if near is not None:
        return near + moment.strftime("%H:%M:%S" if not near else "%H:%M")
    return moment.strftime("%a %H:%M" if 0 < days < 7 else "%-d %b %H:%M")


def elapsed_s(row: RequestRow, now_unix_s: float) -> float:
    """Seconds since its start, or from start to end; 0 before it starts."""
    return max(0.0, (row.end_unix_s or now_unix_s) - row.start_unix_s) if row.start_unix_s else 0.0


def queued_s(row: RequestRow, now_unix_s: float) -> float:
    return max(0.0, (row.start_unix_s or row.end_unix_s or now_unix_s) - row.submit_unix_s)


def error_text(row: RequestRow) -> str:
    """What went wrong, and the remedy, in one line."""
    return "; ".join(row.error.splitlines())


def slack_text(slack_s: float | None) -> str:
    """A signed slack in at most eight characters: `+1:10`, `-2:03:04`, `+12h05m`, `+3d04h`."""
    if slack_s is None:
        return "N/A"
    seconds = int(abs(slack_s))
    sign = "-" if slack_s < 0 else "+"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if hours < 1:
        return f"{sign}{minutes}:{seconds % 60:02d}"
    if hours < 10:
        return f"{sign}{hours}:{minutes % 60:02d}:{seconds % 60:02d}"
    return f"{sign}{hours}h{minutes % 60:02d}m" if days < 1 else f"{sign}{days}d{hours % 24:02d}h"


def number(value: float | None) -> str:
    return "N/A" if value is None else f"{value:.4g}"


def state_text(row: RequestRow) -> str:
    """sacct's long state: `CANCELLED by 1001` names who."""
    by = row.cancelled_by
    return f"CANCELLED by {by}" if by is not None and row.state is RequestState.CANCELLED else _LONG[row.state]


def met_text(row: RequestRow) -> str:
    met = row.met
    return "Unknown" if met is None else "yes" if met else "no"


def _nodes_or_reason(row: RequestRow, _: float) -> str:
    if row.state is _RUNNING:
        return row.nodes
    return f"({row.reason})" if row.state is _PENDING or not row.nodes else row.nodes


def _time_left(row: RequestRow, now_unix_s: float) -> str:
    return format_duration(row.deadline_unix_s - now_unix_s) if row.deadline_unix_s else "N/A"


def _submitted(row: RequestRow) -> float:
    return row.submit_unix_s


def _deadline(row: RequestRow) -> float:
    return row.deadline_unix_s or float("inf")  # none comes last


def _bank_hit(row: RequestRow, _: float) -> str:
    return row.start.split(":", 1)[1][:12] if row.start.startswith("bank:") else "no" if row.start else "Unknown"


def _signed(slack_s: float | None) -> str:
    return "Unknown" if slack_s is None else ("" if slack_s < 0 else "+") + format_duration(slack_s)


def _f(name: str, header: str, width: int, cell: Any, **more: Any) -> Field[RequestRow]:
    return Field(name, header, width, cell, **more)


QUEUE_FIELDS: tuple[Field[RequestRow], ...] = (
    _f("ReqID", "REQID", 10, lambda r, _: str(r.id), letter="i", key=lambda r: r.id),
    _f("Partition", "PARTITION", 10, lambda r, _: r.partition or "n/a", letter="P"),
    _f("Pool", "POOL", 10, lambda r, _: r.pool or "n/a", letter="p"),
    _f("Model", "MODEL", 12, lambda r, _: r.model, letter="m"),
    _f("Name", "NAME", 12, lambda r, _: r.job_name, letter="j"),
    _f("UserName", "USER", 9, lambda r, _: r.user, letter="u"),
    _f("UserID", "UID", 8, lambda r, _: str(r.uid), letter="U", key=lambda r: r.uid),
    _f("Account", "ACCOUNT", 10, lambda r, _: r.account, letter="a"),
    _f("QOS", "QOS", 8, lambda r, _: r.qos or "N/A", letter="q"),
    _f("StateCompact", "ST", 4, lambda r, _: _SHORT[r.state], letter="t", key=lambda r: _ORDER[r.state]),
    _f("State", "STATE", 13, lambda r, _: _LONG[r.state], letter="T", key=lambda r: _ORDER[r.state]),
    _f("TimeUsed", "TIME", 10, lambda r, now: format_duration(elapsed_s(r, now)), letter="M"),
    _f("TimeLeft", "TIME_LEFT", 10, _time_left, letter="L", key=_deadline),
    _f(
        "Slack",
        "SLACK",
        8,
        lambda r, _: slack_text(r.slack_s),
        letter="k",
        key=lambda r: float("inf") if r.slack_s is None else r.slack_s,
    ),
    _f("ReasonList", "NODELIST(REASON)", 20, _nodes_or_reason, letter="R"),
    _f("Reason", "REASON", 14, lambda r, _: r.reason, letter="r"),
    _f("NodeList", "NODELIST", 14, lambda r, _: r.nodes, letter="N"),
    _f("SubmitTime", "SUBMIT_TIME", 19, lambda r, _: instant(r.submit_unix_s), letter="V", key=_submitted),
    _f("StartTime", "START_TIME", 19, lambda r, _: instant(r.start_unix_s), letter="S", key=lambda r: r.start_unix_s),
    _f("Deadline", "DEADLINE", 19, lambda r, _: instant(r.deadline_unix_s), letter="d", key=_deadline),
    _f(
        "EndTime",
        "END_TIME",
        19,
        lambda r, _: instant(r.end_unix_s or r.predicted_finish_unix_s),
        letter="e",
        key=lambda r: r.end_unix_s or r.predicted_finish_unix_s,
    ),
    _f("Steps", "STEPS", 12, lambda r, _: f"{r.step}/{r.max_steps}", letter="s", key=lambda r: r.step),
    _f("Loss", "LOSS", 8, lambda r, _: number(r.loss), letter="l", key=lambda r: (r.loss is None, r.loss)),
    _f("Score", "SCORE", 8, lambda r, _: number(r.score), letter="g", key=lambda r: (r.score is None, r.score)),
    _f("Allocation", "ALLOCATION", 24, lambda r, _: r.allocation or "N/A", letter="A"),
    _f("SlurmJobID", "SLURM_JOBID", 12, lambda r, _: r.job_id or "N/A", letter="J"),
    _f("Comment", "COMMENT", 20, lambda r, _: r.comment, letter="C"),
)

ACCOUNTING_FIELDS: tuple[Field[RequestRow], ...] = (
    _f("ReqID", "", 8, lambda r, _: str(r.id), left=True),
    _f("JobName", "", 10, lambda r, _: r.job_name),
    _f("Model", "", 10, lambda r, _: r.model),
    _f("Pool", "", 10, lambda r, _: r.pool),
    _f("Partition", "", 10, lambda r, _: r.partition),
    _f("Account", "", 10, lambda r, _: r.account),
    _f("User", "", 9, lambda r, _: r.user),
    _f("UID", "", 6, lambda r, _: str(r.uid)),
    _f("QOS", "", 10, lambda r, _: r.qos),
    _f("State", "", 10, lambda r, _: state_text(r)),
    _f("Reason", "", 12, lambda r, _: r.reason),
    _f("ExitCode", "", 8, lambda r, _: f"{r.exit_code}:0"),
    _f("Submit", "", 19, lambda r, _: instant(r.submit_unix_s, "Unknown")),
    _f("Start", "", 19, lambda r, _: instant(r.start_unix_s, "Unknown")),
    _f("FirstStep", "", 19, lambda r, _: instant(r.first_step_unix_s, "Unknown")),
    _f("End", "", 19, lambda r, _: instant(r.end_unix_s, "Unknown")),
    _f("Deadline", "", 19, lambda r, _: instant(r.deadline_unix_s, "None")),
    _f("Predicted", "", 19, lambda r, _: instant(r.predicted_finish_unix_s, "Unknown")),
    _f("Slack", "", 11, lambda r, _: _signed(r.slack_s)),
    _f("Met", "", 7, lambda r, _: met_text(r)),
    _f("Elapsed", "", 10, lambda r, now: format_duration(elapsed_s(r, now))),
    _f("QueueSec", "", 8, lambda r, now: f"{queued_s(r, now):.3f}"),
    _f("TrainSec", "", 8, lambda r, now: f"{elapsed_s(r, now):.3f}"),
    _f("LookupSec", "", 9, lambda r, _: f"{r.lookup_s:.3f}"),
    _f("GPUSec", "", 8, lambda r, _: f"{r.gpu_s:.1f}"),
    _f("Steps", "", 6, lambda r, _: str(r.step)),
    _f("MaxSteps", "", 8, lambda r, _: str(r.max_steps)),
    _f("Loss", "", 8, lambda r, _: number(r.loss)),
    _f("Score", "", 8, lambda r, _: number(r.score)),
    _f("Metric", "", 8, lambda r, _: r.metric),
    _f("Target", "", 8, lambda r, _: number(r.target_score)),
    _f("Init", "", 12, lambda r, _: r.start.split(":", 1)[0] or "Unknown"),
    _f("BankHit", "", 12, _bank_hit),
    _f("Attempts", "", 8, lambda r, _: str(r.attempts)),
    _f("PromptTokens", "", 12, lambda r, _: str(r.virtual_tokens)),
    _f("BatchSize", "", 9, lambda r, _: str(r.batch_size)),
    _f("Seed", "", 6, lambda r, _: str(r.seed)),
    _f("Allocation", "", 24, lambda r, _: r.allocation),
    _f("SlurmJobID", "", 12, lambda r, _: r.job_id),
    _f("StepID", "", 12, lambda r, _: r.step_id),
    _f("NodeList", "", 15, lambda r, _: r.nodes),
    _f("Comment", "", 14, lambda r, _: r.comment),
    _f("Error", "", 20, lambda r, _: error_text(r)),
)

_TIMES = tuple(name for name in RequestRow.__struct_fields__ if name.endswith("_unix_s"))


def as_json(row: RequestRow) -> dict[str, Any]:
    """A request for `--json`: numbers as numbers, times as epoch seconds, null for what is not there yet."""
    shown = {name: getattr(row, name) for name in row.__struct_fields__}
    for name in _TIMES:
        shown[name] = shown[name] or None
    return {**shown, "met": row.met, "slack_s": row.slack_s}

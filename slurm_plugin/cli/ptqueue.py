"""ptqueue: lists requests that wait or run, as squeue lists jobs."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from broker.protocol.errors import NotFound, UsageError
from broker.protocol.messages import Queue, Requests
from broker.protocol.rows import RequestRow
from broker.protocol.states import RequestState
from broker.protocol.times import format_duration, format_instant
from slurm_plugin.cli.common import (
    command,
    envelope,
    expect,
    open_broker,
    own_name,
    printable,
    refuse,
    request_ids,
    split_list,
    warn,
)
from slurm_plugin.cli.fields import QUEUE_FIELDS, as_json, error_text, queued_s, slack_text
from slurm_plugin.cli.options import FiniteRange
from slurm_plugin.cli.table import Table, emit, letter_format, long_format, sort_rows

if TYPE_CHECKING:
    from broker.net.client import BrokerClient

NAME = "ptqueue"
FORMAT = "%.12i %.10P %.14m %.8u %.2t %.10M %.10L %.8k %R"
LONG_FORMAT = "%.12i %.10P %.14m %.14j %.8u %.9a %.13T %.10M %.19d %.10L %.8k %.11s %R"
START_FORMAT = "%.12i %.10P %.14m %.8u %.2t %.19e %.19d %.8k %R"
ENDED_WITHIN_S = 300.0  # as squeue's MinJobAge: how long ended requests can be listed by state or id

_MEANINGS = {
    "None": "nothing holds it: it will be placed at the broker's next look",
    "Priority": "warm workers exist, and requests with earlier deadlines hold them",
    "Resources": "all workers that its pool may have are busy (the cap is in ptinfo -s)",
    "ColdStart": "an allocation for it is on its way; the model is being loaded",
    "PoolDown": "Slurm refuses the pool's allocations (ptinfo -R has its words)",
    "WorkerLost": "its worker went away; it goes on from its last checkpoint on another",
}


@command(NAME, h_is_help=False)
@click.option("-u", "--user", envvar="PTQUEUE_USERS", metavar="NAMES", help="Of these users.")
@click.option("--me", is_flag=True, help="Of mine.")
@click.option("-A", "--account", envvar="PTQUEUE_ACCOUNT", metavar="NAMES", help="Charged to these accounts.")
@click.option("-p", "--partition", envvar="PTQUEUE_PARTITION", metavar="NAMES", help="In these partitions or pools.")
@click.option("-q", "--qos", envvar="PTQUEUE_QOS", metavar="NAMES", help="With these qualities of service.")
@click.option("-j", "--jobs", metavar="IDS", help="These requests, also when they ended in the last minutes.")
@click.option("-n", "--name", envvar="PTQUEUE_NAMES", metavar="NAMES", help="With these names.")
@click.option(
    "-t", "--states", envvar="PTQUEUE_STATES", metavar="STATES", help="In these states (PD, R, CD, ...), or all."
)
@click.option(
    "-S", "--sort", envvar="PTQUEUE_SORT", metavar="FIELDS", help="Sort by these: -o's letters; - is downwards."
)
@click.option("-i", "--iterate", type=FiniteRange(0.1, 86_400), metavar="SECONDS", help="Repeat.")
@click.option("-h", "--noheader", is_flag=True, help="No header.")
@click.option("-l", "--long", "long_", is_flag=True, help="More columns.")
@click.option("--start", is_flag=True, help="Predicted ends of those that wait.")
@click.option("-o", "--format", "format_", envvar="PTQUEUE_FORMAT", metavar="FORMAT", help=f"Columns: '{FORMAT}'.")
@click.option("-O", "--Format", "fields", envvar="PTQUEUE_FORMAT2", metavar="FIELDS", help="Columns: 'ReqID:10,State'.")
@click.option("--json", "json_", is_flag=True, help="Print one JSON document.")
@click.option("--why", metavar="ID", help="Explain where this request stands.")
@refuse("-r/--array", "-a/--all", "--yaml", "-s/--steps", flag=True)
@refuse("-w/--nodelist", "-M/--clusters", "-R/--reservation", "-L/--licenses")
def main(**options: Any) -> None:
    """List the requests that wait or run."""
    view = View(options)
    with open_broker(options["site_file"]) as client:
        while True:
            rows, cluster, now = view.rows(client)
            if options["why"]:
                emit([printable(line) for row in rows for line in explain(row, now)])
            elif options["json_"]:
                click.echo(envelope("requests", [as_json(row) for row in rows], _meta(cluster, now)), nl=False)
            else:
                emit(view.lines(rows, now))
            if not options["iterate"]:
                return
            time.sleep(options["iterate"])


def _meta(cluster: str, now_unix_s: float) -> dict[str, Any]:
    return {"command": NAME, "cluster": cluster, "time_unix_s": now_unix_s}


class View:
    """Which requests to list, in which order and columns."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Raises UsageError for what the options cannot mean, before a broker is asked."""
        self._options = options
        words = [options["why"]] if options["why"] else [options["jobs"] or ""]
        self._ids = request_ids(words)
        self._states = _states(options["states"])
        self._keep = _filters(options)
        self._table = _table(options)
        self._sort = options["sort"] or "t,i"
        sort_rows([], self._sort, QUEUE_FIELDS, 0.0)

    def rows(self, client: BrokerClient) -> tuple[list[RequestRow], str, float]:
        """The requests to list, the cluster's name and the time of the answer."""
        ended = bool(self._ids) or any(state.final for state in self._states)
        query = Queue(ids=self._ids, ended_within_s=ENDED_WITHIN_S if ended else 0.0)
        reply = expect(client.call(query), Requests)
        now = time.time()
        rows = reply.rows
        self._check_ids(rows)
        if self._states:
            rows = [row for row in rows if row.state in self._states]
        for keep in self._keep:
            rows = [row for row in rows if keep(row)]
        sort_rows(rows, self._sort, QUEUE_FIELDS, now)
        return rows, reply.cluster, now

    def _check_ids(self, rows: list[RequestRow]) -> None:
        missing = set(self._ids) - {row.id for row in rows}
        if missing and len(missing) == len(set(self._ids)):
            shown = ", ".join(map(str, sorted(missing)[:10]))
            raise NotFound(f"not in the queue: {shown}", f"ptacct -j {min(missing)} lists requests that ended")
        for request_id in sorted(missing):
            warn(NAME, f"not in the queue: {request_id}")

    def lines(self, rows: list[RequestRow], now_unix_s: float) -> list[str]:
        top = []
        if (self._options["long_"] or self._options["iterate"]) and not self._options["noheader"]:
            top = [datetime.fromtimestamp(now_unix_s).strftime("%a %b %d %H:%M:%S %Y")]
        return top + self._table.lines(rows, now_unix_s, header=not self._options["noheader"])


def _table(options: dict[str, Any]) -> Table[RequestRow]:
    if options["fields"]:
        return long_format(options["fields"], QUEUE_FIELDS)
    standard = START_FORMAT if options["start"] else LONG_FORMAT if options["long_"] else FORMAT
    return letter_format(options["format_"] or standard, QUEUE_FIELDS)


def _states(text: str | None) -> set[RequestState]:
    """States by their short or long names; an empty set leaves the choice to the broker."""
    words = {word.upper() for word in split_list(text)}
    if "ALL" in words:
        return set(RequestState)
    known = {name: state for state in RequestState for name in (state.value, state.short)}
    for word in words - known.keys():
        raise UsageError(f"unknown state {word[:40]!r}", f"known: all, {', '.join(known)}")
    return {known[word] for word in words}


def _filters(options: dict[str, Any]) -> list[Callable[[RequestRow], bool]]:
    keep: list[Callable[[RequestRow], bool]] = []
    users = set(split_list(options["user"])) | ({own_name()} if options["me"] else set())
    if users:
        keep.append(lambda row: row.user in users or str(row.uid) in users)
    if accounts := set(split_list(options["account"])):
        keep.append(lambda row: row.account in accounts)
    if partitions := set(split_list(options["partition"])):
        keep.append(lambda row: row.partition in partitions or row.pool in partitions)
    if qos := set(split_list(options["qos"])):
        keep.append(lambda row: row.qos in qos)
    if names := set(split_list(options["name"])):
        keep.append(lambda row: row.job_name in names)
    if options["start"]:
        keep.append(lambda row: row.state is RequestState.PENDING)
    return keep


def explain(row: RequestRow, now_unix_s: float) -> list[str]:
    """Where a request stands and why, in words."""
    lines = [f"request {row.id} ({row.job_name}) of {row.user}, model {row.model}: {row.state.value}"]
    if row.state is RequestState.PENDING:
        meaning = _MEANINGS.get(row.reason, "the broker gave no more words")
        lines.append(f"  waits for {format_duration(queued_s(row, now_unix_s))} ({row.reason}): {meaning}")
    elif row.state is RequestState.RUNNING:
        lines.append(f"  runs on {row.nodes or 'this host'} in {row.allocation}, step {row.step} of {row.max_steps}")
    else:
        lines.append(f"  ended {format_instant(row.end_unix_s)}" + (f": {error_text(row)}" if row.error else ""))
    if row.attempts > 1:
        lines.append(f"  attempt {row.attempts}: a worker was lost, nothing was started anew")
    if row.predicted_finish_unix_s and not row.state.final:
        lines.append(f"  predicted finish {format_instant(row.predicted_finish_unix_s)}")
    if row.deadline_unix_s:
        lines.append(f"  deadline {format_instant(row.deadline_unix_s)}, slack {slack_text(row.slack_s)}")
    return lines

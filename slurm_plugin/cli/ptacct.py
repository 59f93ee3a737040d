"""ptacct: what requests used and whether they met their deadlines, as sacct does for jobs."""

from __future__ import annotations

import os
import time
from typing import Any

import click

from broker.protocol.errors import NotFound, UsageError
from broker.protocol.messages import Accounting, Requests
from broker.protocol.rows import RequestRow
from broker.protocol.states import RequestState
from broker.protocol.times import format_instant, parse_instant
from slurm_plugin.cli.common import (
    command,
    envelope,
    expect,
    open_broker,
    own_name,
    refuse,
    request_ids,
    say,
    split_list,
)
from slurm_plugin.cli.fields import ACCOUNTING_FIELDS, as_json
from slurm_plugin.cli.options import InstantType
from slurm_plugin.cli.table import emit, named_format

NAME = "ptacct"
BRIEF = "ReqID,State,ExitCode"
FORMAT = "ReqID,JobName,Model,Account,State,Elapsed,GPUSec,Steps,Score,BankHit,Met,ExitCode"
LONG_FORMAT = ",".join(field.name for field in ACCOUNTING_FIELDS)


@command(NAME)
@click.option("-j", "--jobs", metavar="IDS", help="These requests, from any time.")
@click.option("-u", "--user", metavar="NAMES", help="Of these users.")
@click.option("-a", "--allusers", is_flag=True, help="Of all users whose requests I may see.")
@click.option("-A", "--accounts", metavar="NAMES", help="Charged to these accounts.")
@click.option(
    "-S", "--starttime", type=InstantType(past=True), metavar="TIME", help="From this time on.  [default: 00:00]"
)
@click.option("-E", "--endtime", type=InstantType(past=True), metavar="TIME", help="Until this time.  [default: now]")
@click.option("-s", "--state", metavar="STATES", help="In these states.")
@click.option("-r", "--partition", metavar="NAMES", help="In these partitions or pools.")
@click.option("--name", metavar="NAMES", help="With these names.")
@click.option("-n", "--noheader", is_flag=True, help="No header.")
@click.option("-p", "--parsable", is_flag=True, help="'|' after each field.")
@click.option("-P", "--parsable2", is_flag=True, help="'|' between fields.")
@click.option("--delimiter", metavar="TEXT", help="In the place of '|'.")
@click.option("-X", "--allocations", is_flag=True, help="One line for each request (which is always so).")
@click.option("-b", "--brief", is_flag=True, help=f"The fields {BRIEF}.")
@click.option("-l", "--long", "long_", is_flag=True, help="All fields.")
@click.option(
    "-o", "--format", "format_", envvar="PTACCT_FORMAT", metavar="FIELDS", help="Fields: 'ReqID,Model%20,Met'."
)
@click.option("-e", "--helpformat", is_flag=True, help="List the fields.")
@click.option("--json", "json_", is_flag=True, help="Print one JSON document.")
@refuse("-D/--duplicates", "-L/--allclusters", "-T/--truncate", "--yaml", flag=True)
@refuse("--units", "-M/--clusters", "-N/--nodelist", "-q/--qos", "-g/--gid", "-f/--file", "-x/--associations")
def main(**options: Any) -> None:
    """Show what requests used, how they ended, and whether they met their deadlines."""
    if options["helpformat"]:
        emit([field.name for field in ACCOUNTING_FIELDS])
        return
    if options["delimiter"] is not None and len(options["delimiter"]) == 0:
        raise UsageError("--delimiter is empty", "for instance: --delimiter=,")
    table = named_format(_format(options), ACCOUNTING_FIELDS)
    query, states = _query(options), _states(options["state"])
    with open_broker(options["site_file"]) as client:
        reply = expect(client.call(query, timeout_s=60.0), Requests)
    now = time.time()
    rows = [row for row in reply.rows if _wanted(row, options) and (not states or row.state in states)]
    rows.sort(key=lambda row: row.id)
    if query.ids and not reply.rows:
        raise NotFound(f"no such request: {options['jobs']}", "ptacct lists yours of today; -S sets an earlier start")
    if options["json_"]:
        meta = {"command": NAME, "cluster": reply.cluster, "start_unix_s": query.start_unix_s, "time_unix_s": now}
        click.echo(envelope("requests", [as_json(row) for row in rows], meta), nl=False)
        return
    header = not options["noheader"]
    if options["parsable"] or options["parsable2"]:
        delimiter = options["delimiter"] or "|"
        lines = table.delimited_lines(rows, now, delimiter, header)
        emit([line + delimiter for line in lines] if options["parsable"] else lines)
    else:
        emit(table.accounting_lines(rows, now, header))
    if not rows and not query.ids:
        say(NAME, f"no requests since {format_instant(query.start_unix_s)} (-S sets the start)")


def _format(options: dict[str, Any]) -> str:
    if options["format_"]:
        return str(options["format_"])
    return LONG_FORMAT if options["long_"] else BRIEF if options["brief"] else FORMAT


def _query(options: dict[str, Any]) -> Accounting:
    ids = request_ids([options["jobs"] or ""])
    if options["jobs"] is not None and not ids:
        raise UsageError("--jobs names no request", "for instance: -j 12,13")
    start = options["starttime"]
    if start is None:
        start = 0.0 if ids else parse_instant("today", time.time())
    end = options["endtime"]
    if end is not None and end < start:
        raise UsageError(f"the end {format_instant(end)} is before the start {format_instant(start)}", "see -S and -E")
    return Accounting(ids=ids, start_unix_s=start, end_unix_s=end)


def _states(text: str | None) -> set[RequestState]:
    words = {word.upper() for word in split_list(text)}
    known = {name: state for state in RequestState for name in (state.value, state.short)}
    for word in words - known.keys():
        raise UsageError(f"unknown state {word[:40]!r}", f"known: {', '.join(known)}")
    return {known[word] for word in words}


def _wanted(row: RequestRow, options: dict[str, Any]) -> bool:
    users = set(split_list(options["user"]))
    if users:
        if row.user not in users and str(row.uid) not in users:
            return False
    elif not options["allusers"] and not options["jobs"] and os.geteuid() != 0 and row.user != own_name():
        return False  # as sacct: one's own, but all for root
    accounts, names = set(split_list(options["accounts"])), set(split_list(options["name"]))
    partitions = set(split_list(options["partition"]))
    return (
        (not accounts or row.account in accounts)
        and (not names or row.job_name in names)
        and (not partitions or row.partition in partitions or row.pool in partitions)
    )

"""ptcancel: ends requests, as scancel ends jobs."""

from __future__ import annotations

import sys
from typing import Any

import click

from broker.protocol.errors import UsageError
from broker.protocol.messages import Cancel, Cancelled, Queue, Requests
from broker.protocol.states import RequestState
from slurm_plugin.cli.common import command, expect, open_broker, own_name, refuse, request_ids, say, warn

NAME = "ptcancel"
_STATES = {name: state for state in RequestState if not state.final for name in (state.value, state.short)}


@command(NAME)
@click.argument("ids", nargs=-1)
@click.option("-u", "--user", metavar="NAME", help="Mine: the name must be my own.")
@click.option("--me", is_flag=True, help="All of mine.")
@click.option("-A", "--account", metavar="NAME", help="Charged to this account.")
@click.option("-p", "--partition", metavar="NAME", help="In this partition.")
@click.option("-n", "--name", "--jobname", metavar="NAME", help="With this name.")
@click.option("-t", "--state", metavar="STATE", help="PENDING or RUNNING.")
@click.option("-i", "--interactive", is_flag=True, help="Ask before each one.")
@click.option("-Q", "--quiet", is_flag=True, help="Nothing is said of requests that ended already.")
@click.option("-v", "--verbose", is_flag=True, help="Say what was cancelled.")
@refuse("-s/--signal", "-q/--qos", "-M/--clusters", "-w/--nodelist", "--reason", "-R/--reservation")
@refuse("-b/--batch", "-f/--full", "-H/--hurry", flag=True)
def main(ids: tuple[str, ...], **options: Any) -> None:
    """Cancel requests by their IDS, or mine that match all the filters given."""
    message = _message(request_ids(ids), options)
    with open_broker(options["site_file"]) as client:
        if options["interactive"]:
            rows = expect(client.call(Queue(ids=message.ids)), Requests).rows
            chosen = [row.id for row in rows if _matches(row, message) and _agreed(row.id, row.job_name)]
            if not chosen:
                return
            message = Cancel(ids=chosen)
        reply = expect(client.call(message), Cancelled)
    if options["verbose"]:
        for request_id in reply.ids:
            say(NAME, f"cancelled request {request_id}")
    if options["verbose"] and not options["quiet"]:
        for request_id in reply.already_ended:
            warn(NAME, f"request {request_id} had ended already")
        if not reply.ids and not reply.already_ended:
            warn(NAME, "no request matched")


def _message(ids: list[int], options: dict[str, Any]) -> Cancel:
    if options["user"] and options["user"] != own_name():
        raise UsageError(
            f"--user={options['user']}: filters reach your own requests only", "an administrator cancels others' by id"
        )
    state = None
    if options["state"]:
        state = _STATES.get(options["state"].upper())
        if state is None:
            raise UsageError(
                f"--state={options['state'][:40]}: nothing to cancel in it", f"allowed: {', '.join(_STATES)}"
            )
    filters = {"account": options["account"], "partition": options["partition"], "job_name": options["name"]}
    mine = bool(options["me"] or options["user"] or state or any(filters.values()))
    if not ids and not mine:
        raise UsageError("nothing to cancel was named", "give ids, --me, or filters such as --name=NAME")
    return Cancel(ids=ids, mine=mine, state=state, **filters)


def _matches(row: Any, message: Cancel) -> bool:
    if message.mine and not message.ids and row.user != own_name():
        return False
    wanted = {name: getattr(message, name) for name in ("account", "partition", "job_name", "state")}
    return all(value is None or getattr(row, name) == value for name, value in wanted.items())


def _agreed(request_id: int, job_name: str) -> bool:
    if not sys.stdin.isatty():
        raise UsageError("--interactive needs a terminal to ask on", "leave it out in scripts")
    return click.confirm(f"Cancel request {request_id} ({job_name})", err=True)

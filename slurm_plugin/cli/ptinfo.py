"""ptinfo: pools, their allocations and what they do, as sinfo shows partitions and nodes."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any, NamedTuple

import click
import msgspec

from broker.protocol.messages import Info, InfoReply
from broker.protocol.rows import AllocationRow, PoolRow
from broker.protocol.states import AllocationState
from broker.protocol.times import format_duration
from slurm_plugin.cli.common import command, envelope, expect, open_broker, refuse, split_list
from slurm_plugin.cli.fields import instant
from slurm_plugin.cli.table import Field, emit, letter_format

NAME = "ptinfo"
FORMAT = "%10P %5a %.12l %.5D %10t %16m %g"
SUMMARY_FORMAT = "%10P %5a %16m %.5c %.5f %.5x %.9w %.9n %.7q %.5s %S"
NODES_FORMAT = "%26A %10P %10t %.14J %14N %.8G %.8r %.12l %.19S %.8M"
REASONS_FORMAT = "%50R %10P %26A"


class Group(NamedTuple):
    """The allocations of one pool that are in one state; without a state, all of them."""

    pool: PoolRow
    state: str
    allocations: list[AllocationRow]


class One(NamedTuple):
    pool: PoolRow
    allocation: AllocationRow


class Why(NamedTuple):
    reason: str
    pool: str
    allocation: str


def state_word(allocation: AllocationRow) -> str:
    """`idle`, `warm` (runs something, has room) or `busy` (no slot free) once it is warm; else its state."""
    if allocation.state is not AllocationState.WARM:
        return "pending" if allocation.state is AllocationState.ORDERED else allocation.state.value
    if not allocation.running:
        return "idle"
    return "busy" if len(allocation.running) >= allocation.slots else "warm"


def life_left(allocations: list[AllocationRow], now_unix_s: float) -> str:
    """Until the first of them ends by its time limit; local ones have none."""
    ends = [allocation.end_unix_s for allocation in allocations if allocation.end_unix_s]
    if ends:
        return format_duration(max(0.0, min(ends) - now_unix_s))
    return "UNLIMITED" if any(allocation.started_unix_s for allocation in allocations) else "n/a"


def _avail(pool: PoolRow) -> str:
    return "up" if pool.available else "down"


def _count(group: Group, *words: str) -> str:
    return str(sum(state_word(allocation) in words for allocation in group.allocations))


def _busy_idle(group: Group, _: float) -> str:
    running = sum(bool(allocation.running) for allocation in group.allocations)
    warm = sum(allocation.state is AllocationState.WARM for allocation in group.allocations)
    return f"{running}/{max(0, warm - running)}"


def _gpus(group: Group, _: float) -> str:
    return str(len(group.allocations) * group.pool.gpus_per_worker)


GROUP_FIELDS: tuple[Field[Group], ...] = (
    Field("Pool", "POOL", 10, lambda g, _: g.pool.name, "P"),
    Field("Partition", "PARTITION", 10, lambda g, _: g.pool.partition, "p"),
    Field("Avail", "AVAIL", 5, lambda g, _: _avail(g.pool), "a"),
    Field("LifeLeft", "LIFE_LEFT", 12, lambda g, now: life_left(g.allocations, now), "l"),
    Field("GPUs", "GPUS", 5, _gpus, "D"),
    Field("State", "STATE", 10, lambda g, _: g.state, "t"),
    Field("Model", "MODEL", 16, lambda g, _: g.pool.model, "m"),
    Field("BusyIdle", "BUSY/IDLE", 9, _busy_idle, "g"),
    Field("Allocations", "ALLOC", 5, lambda g, _: str(len(g.allocations)), "c"),
    Field("Floor", "FLOOR", 5, lambda g, _: str(g.pool.min_workers), "f"),
    Field("Cap", "CAP", 5, lambda g, _: str(g.pool.max_workers), "x"),
    Field("WarmIdle", "WARM/IDLE", 9, lambda g, _: f"{_count(g, 'warm', 'busy')}/{_count(g, 'idle')}", "w"),
    Field("Coming", "COMING", 9, lambda g, _: _count(g, "pending", "loading"), "n"),
    Field("Pending", "PENDING", 7, lambda g, _: str(g.pool.pending_requests), "q"),
    Field("Slots", "SLOTS", 5, lambda g, _: str(g.pool.slots), "s"),
    Field("IdleWindow", "IDLE_WINDOW", 11, lambda g, _: format_duration(g.pool.idle_window_s), "S"),
)

NODE_FIELDS: tuple[Field[One], ...] = (
    Field("Allocation", "ALLOCATION", 26, lambda o, _: o.allocation.name, "A"),
    Field("Pool", "POOL", 10, lambda o, _: o.pool.name, "P"),
    Field("State", "STATE", 10, lambda o, _: state_word(o.allocation), "t"),
    Field("JobID", "JOBID", 10, lambda o, _: o.allocation.job_id or "n/a", "J"),
    Field("Node", "NODE", 14, lambda o, _: o.allocation.node or "n/a", "N"),
    Field("GPUs", "GPUS", 8, lambda o, _: o.allocation.gpus or "n/a", "G"),
    Field("Running", "RUNNING", 8, lambda o, _: f"{len(o.allocation.running)}/{o.allocation.slots}", "r"),
    Field("Requests", "REQUESTS", 20, lambda o, _: ",".join(map(str, o.allocation.running)) or "n/a", "q"),
    Field("LifeLeft", "LIFE_LEFT", 12, lambda o, now: life_left([o.allocation], now), "l"),
    Field("Ready", "READY_SINCE", 19, lambda o, _: instant(o.allocation.ready_unix_s, "n/a"), "S"),
    Field("Memory", "RSS_MB", 8, lambda o, _: f"{o.allocation.rss_mb:.0f}", "M"),
    Field("Model", "MODEL", 16, lambda o, _: o.pool.model, "m"),
    Field("Reason", "REASON", 30, lambda o, _: o.allocation.reason or "none", "R"),
)

REASON_FIELDS: tuple[Field[Why], ...] = (
    Field("Reason", "REASON", 50, lambda w, _: w.reason, "R"),
    Field("Pool", "POOL", 10, lambda w, _: w.pool, "P"),
    Field("Allocation", "ALLOCATION", 26, lambda w, _: w.allocation, "A"),
)


@command(NAME, h_is_help=False)
@click.option("-s", "--summarize", is_flag=True, help="One line for each pool, with its floor and cap.")
@click.option("-N", "--Node", "nodes", is_flag=True, help="One line for each allocation.")
@click.option("-R", "--list-reasons", is_flag=True, help="Why pools or allocations are not well.")
@click.option("-p", "--partition", metavar="NAMES", help="These pools or partitions.")
@click.option("-h", "--noheader", is_flag=True, help="No header.")
@click.option("-o", "--format", "format_", envvar="PTINFO_FORMAT", metavar="FORMAT", help=f"Columns: '{FORMAT}'.")
@click.option("--json", "json_", is_flag=True, help="Print one JSON document.")
@refuse("-a/--all", "-l/--long", "-r/--responding", "-d/--dead", "--yaml", flag=True)
@refuse("-n/--nodes", "-t/--states", "-i/--iterate", "-S/--sort", "-M/--clusters", "-O/--Format")
def main(**options: Any) -> None:
    """Show pools, their warm workers and what these do."""
    lines_of = _view(options)
    with open_broker(options["site_file"]) as client:
        reply = expect(client.call(Info()), InfoReply)
    now = time.time()
    names = set(split_list(options["partition"]))
    pools = [pool for pool in reply.pools if not names or pool.name in names or pool.partition in names]
    if options["json_"]:
        meta = {
            name: value for name, value in msgspec.structs.asdict(reply).items() if name not in ("pools", "version")
        }
        broker = {**meta, "command": NAME, "broker_version": reply.version, "time_unix_s": now}
        click.echo(envelope("pools", [msgspec.to_builtins(pool) for pool in pools], broker), nl=False)
        return
    emit(lines_of(pools, now))


def _view(options: dict[str, Any]) -> Any:
    """From pools and the time to lines; a wrong format is told before a broker is asked."""
    header = not options["noheader"]
    if options["list_reasons"]:
        why = letter_format(options["format_"] or REASONS_FORMAT, REASON_FIELDS)
        return lambda pools, now: why.lines(_reasons(pools), now, header)
    if options["nodes"]:
        each = letter_format(options["format_"] or NODES_FORMAT, NODE_FIELDS)
        return lambda pools, now: each.lines(
            [One(pool, allocation) for pool in pools for allocation in pool.allocations], now, header
        )
    standard = SUMMARY_FORMAT if options["summarize"] else FORMAT
    groups = letter_format(options["format_"] or standard, GROUP_FIELDS)
    split = _summaries if options["summarize"] else _by_state
    return lambda pools, now: groups.lines(split(pools), now, header)


def _summaries(pools: list[PoolRow]) -> list[Group]:
    return [Group(pool, "", pool.allocations) for pool in pools]


def _by_state(pools: list[PoolRow]) -> list[Group]:
    found = []
    for pool in pools:
        states: dict[str, list[AllocationRow]] = defaultdict(list)
        for allocation in pool.allocations:
            states[state_word(allocation)].append(allocation)
        if not states:
            states["n/a" if pool.available else "down"] = []
        found += [Group(pool, state, allocations) for state, allocations in states.items()]
    return found


def _reasons(pools: list[PoolRow]) -> list[Why]:
    found = []
    for pool in pools:
        if pool.reason:
            found.append(Why(pool.reason, pool.name, ""))
        found += [Why(row.reason, pool.name, row.name) for row in pool.allocations if row.reason]
    return found

"""`ptctl demo`: real prompt tuning on warm workers of this machine, from the first request to the accounting."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec import Struct

from broker.protocol.errors import ConfigError
from broker.protocol.messages import Shutdown, Submit, Submitted, Watch
from broker.protocol.rows import RequestRow
from broker.protocol.spec import RequestSpec
from broker.protocol.states import Init, RequestState
from slurm_plugin.cli.common import expect, open_broker
from slurm_plugin.cli.ctl_broker import launch
from slurm_plugin.cli.data import Data, read_data
from slurm_plugin.paths import find_data

if TYPE_CHECKING:
    from broker.net.client import BrokerClient

TARGET_LOSS = 0.1
VIRTUAL_TOKENS = 8
MAX_STEPS = 250
FIRST_SLO_S = 60.0
BURST_SLO_S = 30.0
MAX_DATA_BYTES = 1 << 20


class Pair(Struct):
    """One task of the burst, tuned from the bank and, for comparison, from a random start."""

    task: str
    bank_id: int
    random_id: int


@click.command("demo")
@click.option("--world", type=click.Path(path_type=Path), help="The small world: a folder with tiny/ and tasks/.")
@click.option("--workers", type=click.IntRange(1, 16), default=2, help="Most warm workers.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON document instead of the table.")
def demo(world: Path | None, workers: int, as_json: bool) -> int:
    """Tune prompts on warm workers of this machine and show what the Prompt Bank saves.

    Starts a broker of its own in a temporary folder and ends it. Exit code 0 if every request completed.
    """
    world = world or find_data("small_world")
    tasks = _tasks(world)
    with tempfile.TemporaryDirectory(prefix="pt-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["PROMPTTUNER_RUN_DIR"] = f"{folder}/run"
        os.environ["PROMPTTUNER_STATE_DIR"] = f"{folder}/state"
        os.environ["PROMPTTUNER_CONF_DIR"] = folder
        Path(folder, "site.toml").touch()  # this demo's broker, whatever other site file there is
        _tell(f"starting a broker and a warm worker: ptctl broker start --model tiny={world}/tiny --workers {workers}")
        launch(None, [f"--model=tiny={world / 'tiny'}", f"--workers={workers}"])
        with open_broker(None) as client:
            try:
                pairs, rows = _run(client, world, tasks)
            finally:
                client.call(Shutdown())
    click.echo(_document(pairs, rows) if as_json else _report(pairs, rows))
    return 0 if all(row.state is RequestState.COMPLETED for row in rows.values()) else 1


def _tasks(world: Path) -> dict[str, list[str]]:
    try:
        tasks: dict[str, list[str]] = json.loads((world / "tasks" / "tasks.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{world}: no small world here ({error.strerror})", "name one with --world") from None
    return tasks


def _run(client: BrokerClient, world: Path, tasks: dict[str, list[str]]) -> tuple[list[Pair], dict[int, RequestRow]]:
    first, burst = tasks["first"], tasks["burst"]
    rows: dict[int, RequestRow] = {}
    _tell(f"{len(first)} requests, one after the other: nobody has tuned anything here before")
    for task in first:
        _follow(client, [_submit(client, world, task, Init.BANK, FIRST_SLO_S)], rows, f"  {task}")
    _tell(f"a burst: {len(burst)} new tasks at once, {BURST_SLO_S:.0f} s each")
    from_bank = [_submit(client, world, task, Init.BANK, BURST_SLO_S) for task in burst]
    _follow(client, from_bank, rows, "  burst")
    _tell("the same tasks once more from a random start, to compare")
    from_scratch = [_submit(client, world, task, Init.RANDOM, BURST_SLO_S) for task in burst]
    _follow(client, from_scratch, rows, "  comparison")
    return [Pair(*three) for three in zip(burst, from_bank, from_scratch, strict=True)], rows


def _submit(client: BrokerClient, world: Path, task: str, init: Init, slo_s: float) -> int:
    train, evaluation = (_data(world / "tasks" / f"{task}.{part}.jsonl") for part in ("train", "eval"))
    spec = RequestSpec(
        model="tiny",
        train=train.digest,
        eval=evaluation.digest,
        job_name=task,
        virtual_tokens=VIRTUAL_TOKENS,
        init=init,
        target_score=TARGET_LOSS,
        max_steps=MAX_STEPS,
        deadline_unix_s=time.time() + slo_s,
    )
    blobs = {train.digest: train.canonical, evaluation.digest: evaluation.canonical}
    submit = Submit(spec=spec, submit_key=uuid.uuid4().hex, blobs=blobs)
    return expect(client.call(submit), Submitted).id


def _data(path: Path) -> Data:
    return read_data(path, MAX_DATA_BYTES, 10_000)


def _follow(client: BrokerClient, ids: Iterable[int], rows: dict[int, RequestRow], label: str) -> None:
    waiting = set(ids)
    total, live = len(waiting), sys.stderr.isatty()
    latest: dict[int, RequestRow] = {}
    for update in client.stream(Watch(ids=sorted(waiting))):
        row = update.row
        latest[row.id] = row
        if row.state.final and row.id in waiting:
            waiting.discard(row.id)
            rows[row.id] = row
            if not live and total > 1 and len(waiting) % 10 == 0:
                _tell(f"{label}: {total - len(waiting)} of {total} done")
        if live:
            running = sum(1 for r in latest.values() if r.state is RequestState.RUNNING)
            now = f"{row.job_name} step {row.step} loss {row.loss:.3f}" if row.loss is not None else row.reason
            sys.stderr.write(f"\r\x1b[K{label}: {total - len(waiting)} of {total} done, {running} running | {now}")
            sys.stderr.flush()
        if not waiting:
            break
    if live:
        sys.stderr.write("\n")
    elif total == 1:
        row = next(iter(latest.values()))
        _tell(f"{label}: {row.state.value} after {row.step} steps from {row.start}, loss {row.loss or 0:.3f}")


def _figures(pairs: list[Pair], rows: dict[int, RequestRow]) -> dict[str, float]:
    bank, scratch = (
        [rows[i].step for i in ids] for ids in zip(*((p.bank_id, p.random_id) for p in pairs), strict=True)
    )
    with_deadline = [row for row in rows.values() if row.deadline_unix_s]
    return {
        "requests": len(rows),
        "completed": sum(row.state is RequestState.COMPLETED for row in rows.values()),
        "deadlines_met_share": sum(bool(row.met) for row in with_deadline) / len(with_deadline),
        "bank_steps_mean": statistics.mean(bank),
        "random_steps_mean": statistics.mean(scratch),
        "bank_steps_median": statistics.median(bank),
        "random_steps_median": statistics.median(scratch),
        "gpu_s": sum(row.gpu_s for row in rows.values()),
    }


def _document(pairs: list[Pair], rows: dict[int, RequestRow]) -> str:
    burst = [
        {
            "task": p.task,
            "start": rows[p.bank_id].start,
            "steps": rows[p.bank_id].step,
            "random_steps": rows[p.random_id].step,
            "met": rows[p.bank_id].met,
        }
        for p in pairs
    ]
    return json.dumps({"schema": "pt/1", "demo": _figures(pairs, rows), "burst": burst}, indent=1)


def _report(pairs: list[Pair], rows: dict[int, RequestRow]) -> str:
    figures = _figures(pairs, rows)
    lines = [
        "",
        f"{'ReqID':>6} {'JobName':<24} {'State':<10} {'Start':<18} "
        f"{'Steps':>5} {'Random':>6} {'Loss':>6} {'Slack':>7} Met",
        f"{'-' * 6} {'-' * 24} {'-' * 10} {'-' * 18} {'-' * 5} {'-' * 6} {'-' * 6} {'-' * 7} ---",
    ]
    random_of = {p.bank_id: rows[p.random_id].step for p in pairs}
    for request_id in sorted(rows):
        row = rows[request_id]
        if request_id in {p.random_id for p in pairs}:
            continue
        against = str(random_of.get(request_id, "-"))
        loss = f"{row.loss:.3f}" if row.loss is not None else "-"
        slack = f"{row.slack_s:+.1f}s" if row.slack_s is not None else "-"
        lines.append(
            f"{row.id:>6} {row.job_name:<24} {row.state.value:<10} {row.start:<18} {row.step:>5} {against:>6} "
            f"{loss:>6} {slack:>7} {'yes' if row.met else 'no'}"
        )
    lines += [
        "",
        f"{figures['completed']} of {figures['requests']} requests COMPLETED, "
        f"{100 * figures['deadlines_met_share']:.0f} % of the deadlines met.",
        f"The burst from the bank took {figures['bank_steps_mean']:.1f} steps on average (median "
        f"{figures['bank_steps_median']:g}), from a random start {figures['random_steps_mean']:.1f} (median "
        f"{figures['random_steps_median']:g}).",
    ]
    return "\n".join(lines)


def _tell(text: str) -> None:
    click.echo(text, err=True)

"""ptqueue, ptacct and ptinfo: their formats to the letter, their filters, and hostile names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from broker.protocol.messages import InfoReply, Requests
from broker.protocol.rows import AllocationRow, PoolRow, RequestRow
from broker.protocol.states import AllocationState, RequestState
from slurm_plugin.cli.fields import slack_text

Run = Callable[..., Result]
Row = Callable[..., RequestRow]
PENDING, RUNNING, COMPLETED = RequestState.PENDING, RequestState.RUNNING, RequestState.COMPLETED


@pytest.fixture
def queue(broker: Any, row: Row) -> Any:
    """Three requests: one runs and will be late, one waits, one ended a moment ago."""
    now = time.time()
    broker.rows = [
        row(id=9, state=COMPLETED, user="bob", uid=1002, end_unix_s=now - 5, deadline_unix_s=now + 100, nodes=""),
        row(id=8, state=PENDING, reason="ColdStart", start_unix_s=0.0, user="bob", uid=1002, account="teamb"),
        row(
            id=7,
            start_unix_s=now - 65.2,
            deadline_unix_s=now + 3600.5,
            predicted_finish_unix_s=now + 3670.5,
            job_name="a\x1b[31mb",
        ),
    ]
    broker.answer = lambda message: Requests(rows=broker.rows, cluster="lab")
    return broker


def test_the_default_list_is_squeues_in_our_columns(queue: Any, run: Run) -> None:
    queue.rows = queue.rows[1:]
    result = run("ptqueue")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [
        "       REQID  PARTITION          MODEL     USER ST       TIME  TIME_LEFT    SLACK NODELIST(REASON)",
        "           8      local           tiny      bob PD   00:00:00        N/A      N/A (ColdStart)",
        "           7      local           tiny    alice  R   00:01:05   01:00:00    -1:10 node1",
    ]
    assert queue.heard[0].ids == [] and queue.heard[0].ended_within_s == 0


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        (("-u", "bob"), ["8", "9"]),
        (("-u", "1001"), ["7"]),
        (("-A", "teamb,teamc"), ["8"]),
        (("-p", "tiny"), ["8", "7", "9"]),
        (("-p", "gpu"), []),
        (("-q", "normal"), ["8", "7", "9"]),
        (("-n", "prompt"), ["8", "9"]),
        (("-t", "PD"), ["8"]),
        (("-t", "pending,running"), ["8", "7"]),
        (("-t", "all"), ["8", "7", "9"]),
        (("-j", "7,9"), ["8", "7", "9"]),
        (("-S", "-i"), ["9", "8", "7"]),
        (("-S", "u,-t"), ["7", "9", "8"]),
        (("--start",), ["8"]),
    ],
)
def test_filters_and_sorting(queue: Any, run: Run, words: tuple[str, ...], ids: list[str]) -> None:
    result = run("ptqueue", "-h", "-o", "%i", *words)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split() == ids


def test_ended_requests_are_asked_for_by_state_or_id_only(queue: Any, run: Run) -> None:
    for words in ((), ("-t", "PD"), ("-t", "CD"), ("-j", "9")):
        run("ptqueue", *words)
    assert [message.ended_within_s for message in queue.heard] == [0, 0, 300, 300]


def test_control_characters_never_reach_the_terminal(queue: Any, run: Run) -> None:
    queue.rows = [queue.rows[2]]
    assert run("ptqueue", "-h", "-o", "%j").stdout == "a?[31mb\n"
    assert run("ptacct", "-a", "-nP", "-o", "JobName").stdout == "a?[31mb\n"
    assert "\x1b" not in run("ptqueue", "--why", "7").stdout
    assert "\x1b" not in run("ptqueue", "--json").stdout


def test_formats_take_widths_sides_and_literal_text(queue: Any, run: Run) -> None:
    queue.rows = [queue.rows[2]]
    assert run("ptqueue", "-h", "-o", "<%.5i|%5i|%i|%3P|100%%>").stdout == "<    7|7    |7|loc|100%>\n"
    assert run("ptqueue", "-O", "ReqID:6,State:.9,Steps").stdout.splitlines() == [
        "REQID     STATESTEPS               ",
        "7       RUNNING35/250              ",
    ]
    assert run("ptqueue", "-h", env={"PTQUEUE_FORMAT": "%i"}).stdout == "7\n"


def test_long_and_iterated_lists_begin_with_the_time(queue: Any, run: Run) -> None:
    assert run("ptqueue", "-l").stdout.splitlines()[0].endswith(str(datetime.now().year))
    assert not run("ptqueue", "-lh").stdout.startswith(datetime.now().strftime("%a"))


def test_why_explains(queue: Any, run: Run) -> None:
    queue.rows = [queue.rows[1]]
    out = run("ptqueue", "--why", "8").stdout
    assert "request 8 (prompt) of bob, model tiny: PENDING" in out
    assert "(ColdStart): an allocation for it is on its way" in out


def test_queue_json_has_numbers_and_epoch_seconds(queue: Any, run: Run) -> None:
    document = json.loads(run("ptqueue", "--json").stdout)
    assert document["schema"] == "pt/1" and document["meta"]["cluster"] == "lab"
    waiting, running = document["requests"][:2]
    assert (waiting["id"], waiting["state"], waiting["start_unix_s"], waiting["slack_s"]) == (8, "PENDING", None, None)
    assert running["slack_s"] == pytest.approx(-70)


def test_an_id_that_is_not_there_is_an_error_of_its_own(queue: Any, run: Run) -> None:
    result = run("ptqueue", "-j", "70")
    assert result.exit_code == 6
    assert "not in the queue: 70" in result.stderr and "ptacct -j 70" in result.stderr
    some = run("ptqueue", "-j", "7,70")
    assert some.exit_code == 0 and "warning: not in the queue: 70" in some.stderr


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("ptqueue", ("-o", "%Z"), "unknown format field '%Z'"),
        ("ptqueue", ("-o", "text"), "no field in the format 'text'"),
        ("ptqueue", ("-i", "nan"), "'nan' is not a finite number"),
        ("ptqueue", ("-i", "inf"), "inf is not in the range 0.1<=x<=86400"),
        ("ptqueue", ("-o", "%"), "unknown format field '%'"),
        ("ptqueue", ("-O", "Nothing"), "unknown field 'Nothing'"),
        ("ptqueue", ("-S", "Z"), "unknown field 'Z'"),
        ("ptqueue", ("-t", "DONE"), "unknown state 'DONE'"),
        ("ptqueue", ("-j", "seven"), "not a request id: 'seven'"),
        ("ptqueue", ("-j", "0"), "not a request id: '0'"),
        ("ptqueue", ("-j", "9" * 30), "not a request id"),
        ("ptqueue", ("--yaml",), "--yaml is not supported yet"),
        ("ptqueue", ("-r",), "-r/--array is not supported yet"),
        ("ptqueue", ("-w", "node1"), "-w/--nodelist is not supported yet"),
        ("ptqueue", ("-i", "0"), "-i"),
        ("ptacct", ("-o", "Nothing"), "unknown field 'Nothing'"),
        ("ptacct", ("-s", "DONE"), "unknown state 'DONE'"),
        ("ptacct", ("-S", "someday"), "not a time: 'someday'"),
        ("ptacct", ("-S", "now", "-E", "now-1hour"), "is before the start"),
        ("ptacct", ("-j", ""), "--jobs names no request"),
        ("ptacct", ("--units=K",), "--units is not supported yet"),
        ("ptacct", ("-P", "--delimiter="), "--delimiter is empty"),
        ("ptinfo", ("-o", "%Z"), "unknown format field '%Z'"),
        ("ptinfo", ("--yaml",), "--yaml is not supported yet"),
    ],
)
def test_a_wrong_call_is_told_before_a_broker_is_asked(
    home: Path, run: Run, command: str, words: tuple[str, ...], message: str
) -> None:
    result = run(command, *words)
    assert result.exit_code == 2, result.stderr
    assert result.stderr.startswith(f"{command}: error: ") and message in result.stderr


def test_the_accounting_table_is_sacct_shaped(broker: Any, run: Run, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    cancelled = RequestState.CANCELLED
    broker.answer = lambda message: Requests(
        rows=[
            row(id=8, state=cancelled, cancelled_by=1001, start="", end_unix_s=1002.0, start_unix_s=0.0, score=None),
            row(id=7, state=COMPLETED, end_unix_s=1010.0, deadline_unix_s=1060.0, gpu_s=12.345),
        ]
    )
    assert run("ptacct", "-a").stdout.splitlines() == [
        "ReqID       JobName      Model    Account      State    Elapsed   GPUSec  Steps    Score      BankHit     Met"
        " ExitCode",
        "-------- ---------- ---------- ---------- ---------- ---------- -------- ------ -------- ------------ -------"
        " --------",
        "7            prompt       tiny      teama  COMPLETED   00:00:09     12.3     35     0.25 0123456789ab     yes"
        "      0:0",
        "8            prompt       tiny      teama CANCELLED+   00:00:00      1.5     35      N/A      Unknown Unknown"
        "      0:0",
    ]
    spec = "ReqID,State,Met,Slack,QueueSec,TrainSec,Deadline,End"
    assert run("ptacct", "-anP", "-o", spec).stdout.splitlines() == [
        "7|COMPLETED|yes|+00:00:50|1.000|9.000|1970-01-01T00:17:40|1970-01-01T00:16:50",
        "8|CANCELLED by 1001|Unknown|Unknown|2.000|0.000|None|1970-01-01T00:16:42",
    ]
    assert run("ptacct", "-a", "-pb").stdout.splitlines()[:2] == ["ReqID|State|ExitCode|", "7|COMPLETED|0:0|"]
    assert run("ptacct", "-anP", "--delimiter=;", "-b").stdout.splitlines()[0] == "7;COMPLETED;0:0"
    assert run("ptacct", "-an", "-o", "Model%-8,ReqID%3").stdout.splitlines()[0] == "tiny       7"
    assert run("ptacct", "-aP", "-l").stdout.count("|") > 60


def test_a_delimiter_inside_a_cell_cannot_shift_the_fields(broker: Any, run: Run, row: Row) -> None:
    broker.answer = lambda message: Requests(rows=[row(comment="a|b\nc")])
    assert run("ptacct", "-anP", "-o", "Comment,ReqID").stdout == "a?b?c|7\n"


def test_accounting_begins_today_and_says_so_when_nothing_is_there(broker: Any, run: Run) -> None:
    broker.answer = lambda message: Requests(rows=[])
    result = run("ptacct")
    midnight = datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
    assert result.exit_code == 0
    assert f"no requests since {midnight.isoformat()}" in result.stderr
    assert broker.heard[0].start_unix_s == midnight.timestamp()
    missing = run("ptacct", "-j", "99")
    assert missing.exit_code == 6 and broker.heard[1].ids == [99] and broker.heard[1].start_unix_s == 0


def test_accounting_filters(broker: Any, run: Run, row: Row) -> None:
    rows = [row(id=1), row(id=2, user="bob", uid=1002, account="teamb"), row(id=3, state=COMPLETED, partition="gpu")]
    broker.answer = lambda message: Requests(rows=rows)

    def listed(*words: str) -> list[str]:
        return run("ptacct", "-nP", "-o", "ReqID", *words).stdout.split()

    assert listed("-a") == ["1", "2", "3"]
    assert listed("-u", "bob") == ["2"]
    assert listed("-a", "-A", "teamb") == ["2"]
    assert listed("-a", "-s", "CD") == ["3"]
    assert listed("-a", "-r", "gpu") == ["3"]


@pytest.fixture
def pools(broker: Any) -> Any:
    now = time.time()

    def allocation(name: str, state: AllocationState, running: list[int], **more: Any) -> AllocationRow:
        values: dict[str, Any] = {
            "job_id": "57",
            "node": "node1",
            "gpus": "0",
            "slots": 2,
            "ordered_unix_s": now - 60,
            "started_unix_s": now - 50,
            "ready_unix_s": now - 40,
            "end_unix_s": now + 3600.5,
            "idle_since_unix_s": 0.0,
            "phases_s": {"load": 1.0},
            "rss_mb": 512.0,
            "reason": "",
            **more,
        }
        return AllocationRow(name=name, pool="tiny", state=state, running=running, **values)

    def pool(name: str, allocations: list[AllocationRow], available: bool = True, reason: str = "") -> PoolRow:
        return PoolRow(
            name=name,
            model="tiny",
            partition="gpu",
            min_workers=1,
            max_workers=4,
            idle_window_s=300.0,
            slots=2,
            gpus_per_worker=2,
            pending_requests=3,
            available=available,
            reason=reason,
            allocations=allocations,
        )

    warm, coming = AllocationState.WARM, AllocationState.PENDING
    ordered = {"job_id": "", "node": "", "gpus": "", "started_unix_s": 0.0, "ready_unix_s": 0.0, "end_unix_s": 0.0}
    allocations = [
        allocation("pt-tiny-1", warm, [1, 2]),
        allocation("pt-tiny-2", warm, [3]),
        allocation("pt-tiny-3", warm, []),
        allocation("pt-tiny-4", coming, [], reason="Resources", **ordered),
    ]
    broker.answer = lambda message: InfoReply(
        cluster="lab",
        version="0.1.0",
        backend="slurm",
        mode="site",
        pid=1,
        up_since_unix_s=now,
        active_requests=6,
        rss_mb=50.0,
        pools=[pool("tiny", allocations), pool("big", [], available=False, reason="invalid account")],
    )
    return broker


def test_info_groups_allocations_by_what_they_do(pools: Any, run: Run) -> None:
    assert run("ptinfo").stdout.splitlines() == [
        "POOL       AVAIL    LIFE_LEFT  GPUS STATE      MODEL            BUSY/IDLE",
        "tiny       up        01:00:00     2 busy       tiny             1/0",
        "tiny       up        01:00:00     2 warm       tiny             1/0",
        "tiny       up        01:00:00     2 idle       tiny             0/1",
        "tiny       up             n/a     2 pending    tiny             0/0",
        "big        down           n/a     0 down       tiny             0/0",
    ]


def test_info_by_pool_by_allocation_and_by_reason(pools: Any, run: Run) -> None:
    assert run("ptinfo", "-s").stdout.splitlines()[1].split() == [
        *("tiny", "up", "tiny", "4", "1", "4", "2/1", "1", "3", "2", "00:05:00")
    ]
    lines = run("ptinfo", "-hN").stdout.splitlines()
    assert lines[0].split()[:7] == ["pt-tiny-1", "tiny", "busy", "57", "node1", "0", "2/2"]
    assert lines[3].split()[:7] == ["pt-tiny-4", "tiny", "pending", "n/a", "n/a", "n/a", "0/2"]
    reasons = [line.split() for line in run("ptinfo", "-hR").stdout.splitlines()]
    assert reasons == [["Resources", "tiny", "pt-tiny-4"], ["invalid", "account", "big"]]
    assert run("ptinfo", "-h", "-p", "big").stdout.count("\n") == 1
    document = json.loads(run("ptinfo", "--json").stdout)
    assert document["pools"][0]["allocations"][0]["running"] == [1, 2]
    assert document["meta"]["backend"] == "slurm"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "N/A"),
        (0, "+0:00"),
        (70, "+1:10"),
        (-5.9, "-0:05"),
        (-7384, "-2:03:04"),
        (43500, "+12h05m"),
        (273600, "+3d04h"),
    ],
)
def test_slack_has_a_sign_and_eight_characters_at_most(seconds: float | None, text: str) -> None:
    assert slack_text(seconds) == text
    assert len(text) <= 8


def test_a_reader_that_goes_away_is_no_error(broker: Any, row: Row) -> None:
    broker.answer = lambda message: Requests(rows=[row(id=n) for n in range(1, 3000)])
    program = Path(sys.executable).parent / "ptqueue"
    done = subprocess.run(["bash", "-c", f'"{program}" | head -1'], capture_output=True, text=True, timeout=60)
    assert done.stdout.lstrip().startswith("REQID")
    assert done.stderr == ""


def test_names_that_the_terminal_cannot_show_do_not_end_a_list(broker: Any, row: Row) -> None:
    broker.answer = lambda message: Requests(rows=[row(model="modèle-é")])
    program = str(Path(sys.executable).parent / "ptqueue")
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([program, "-h", "-o", "%m"], capture_output=True, text=True, timeout=60, env=env)
    assert (done.stdout, done.returncode) == ("mod?le-?\n", 0)

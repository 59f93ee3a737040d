"""ptcancel, ptfetch, ptattach, ptctl, and what holds for every command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from broker.protocol.messages import (
    Cancel,
    Cancelled,
    ErrorReply,
    Fetch,
    FetchReply,
    Requests,
    Submitted,
    Update,
    Watch,
)
from broker.protocol.rows import RequestRow
from broker.protocol.states import RequestState
from slurm_plugin import __version__

Run = Callable[..., Result]
Row = Callable[..., RequestRow]
USER_COMMANDS = ["ptbatch", "ptqueue", "ptcancel", "ptacct", "ptinfo", "ptfetch", "ptattach"]
WORDS: dict[str, list[str]] = {
    "ptbatch": ["--model=m", "--train=t.jsonl"],
    "ptcancel": ["7"],
    "ptfetch": ["7"],
    "ptattach": ["7"],
    **{name: [] for name in ("ptqueue", "ptacct", "ptinfo")},
}
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"\0"}


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        (("7", "8,9"), Cancel(ids=[7, 8, 9])),
        (("--me",), Cancel(mine=True)),
        (("-n", "x", "-A", "a", "-p", "gpu"), Cancel(mine=True, job_name="x", account="a", partition="gpu")),
        (("-t", "pd"), Cancel(mine=True, state=RequestState.PENDING)),
    ],
)
def test_cancel_sends_ids_or_filters(broker: Any, run: Run, words: tuple[str, ...], sent: Cancel) -> None:
    broker.answer = lambda message: Cancelled(ids=message.ids)
    result = run("ptcancel", *words)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert broker.heard == [sent]


def test_what_ended_already_is_no_error(broker: Any, run: Run) -> None:
    broker.answer = lambda message: Cancelled(ids=[7], already_ended=[8])
    assert run("ptcancel", "7", "8").stderr == ""
    verbose = run("ptcancel", "-v", "7", "8")
    assert verbose.exit_code == 0
    assert verbose.stderr == "ptcancel: cancelled request 7\nptcancel: warning: request 8 had ended already\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to cancel was named"),
        (("all",), "not a request id: 'all'"),
        (("-t", "COMPLETED"), "nothing to cancel in it"),
        (("-u", "somebody-else"), "filters reach your own requests only"),
        (("-s", "USR1", "7"), "-s/--signal is not supported yet"),
        (("-i", "7"), "--interactive needs a terminal"),
    ],
)
def test_a_wrong_cancel_ends_nothing(broker: Any, run: Run, row: Row, words: tuple[str, ...], message: str) -> None:
    broker.answer = lambda message: Requests(rows=[row()])
    result = run("ptcancel", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not any(isinstance(heard, Cancel) for heard in broker.heard)


@pytest.mark.parametrize(
    ("code", "exit_code"), [("NotFound", 6), ("Auth", 5), ("Refused", 4), ("Transient", 75), ("New", 1)]
)
def test_each_kind_of_refusal_has_its_exit_code(broker: Any, run: Run, code: str, exit_code: int) -> None:
    broker.answer = lambda message: ErrorReply(code=code, message="no\x1b[2J", hint="do this")
    result = run("ptcancel", "7")
    assert result.exit_code == exit_code
    assert result.stderr == "ptcancel: error: no?[2J\nptcancel: do this\n"


def test_a_reply_of_the_wrong_kind_is_told(broker: Any, run: Run) -> None:
    broker.answer = lambda message: Submitted(id=1, predicted_finish_unix_s=None, deadline_unix_s=None, cluster="")
    for command in ("ptqueue", "ptacct", "ptinfo"):
        result = run(command)
        assert result.exit_code == 1
        assert "the broker answered Submitted" in result.stderr


def serving(rows: list[RequestRow]) -> Callable[[Any], Any]:
    def answer(message: Any) -> Any:
        if isinstance(message, Watch):
            return [Update(row=row) for row in rows]
        assert isinstance(message, Fetch)
        return FetchReply(id=message.id, files=FILES)

    return answer


def test_fetch_writes_a_new_folder_and_overwrites_nothing(broker: Any, run: Run, home: Path) -> None:
    broker.answer = serving([])
    first = run("ptfetch", "7")
    assert (first.exit_code, first.stdout) == (0, "Fetched request 7: 2 files in pt-7\n")
    assert {path.name: path.read_bytes() for path in (home / "pt-7").iterdir()} == FILES
    again = run("ptfetch", "7")
    assert again.exit_code == 2 and "is there already and not empty" in again.stderr
    assert len(broker.heard) == 1


def test_fetch_can_wait_for_the_end(broker: Any, run: Run, row: Row, home: Path) -> None:
    broker.answer = serving([row(), row(state=RequestState.COMPLETED)])
    result = run("ptfetch", "7", "--wait", "-o", "out")
    assert result.exit_code == 0 and (home / "out").is_dir()
    broker.answer = serving([row(state=RequestState.FAILED, error="broken")])
    failed = run("ptfetch", "7", "--wait", "-o", "none")
    assert failed.exit_code == 1 and "broken" in failed.stderr
    assert not (home / "none").exists()


def test_attach_follows_to_the_end(broker: Any, run: Run, row: Row) -> None:
    broker.answer = serving([row(id=8), row(step=10), row(state=RequestState.COMPLETED)])
    result = run("ptattach", "7")
    assert result.exit_code == 0
    assert "step 10/250" in result.stderr and "request 8" not in result.stderr
    broker.answer = serving([row(state=RequestState.CANCELLED)])
    assert run("ptattach", "7").exit_code == 1


@pytest.mark.parametrize("command", [*USER_COMMANDS, "ptctl"])
def test_every_command_tells_version_use_and_help(home: Path, run: Run, command: str) -> None:
    assert run(command, "--version").stdout == f"prompttuner {__version__}\n"
    assert run(command, "--usage").stdout.startswith(f"Usage: {command} [OPTIONS]")
    help_ = run(command, "--help")
    assert help_.exit_code == 0 and "Options:" in help_.stdout


@pytest.mark.parametrize("command", USER_COMMANDS)
def test_every_command_without_a_broker_says_how_to_start_one(home: Path, run: Run, command: str) -> None:
    (home / "t.jsonl").write_text('{"input":"a","target":"b"}\n')
    words = WORDS[command]
    result = run(command, *words)
    assert result.exit_code == 3
    assert result.stderr.startswith(f"{command}: error: no broker at ipc://")
    assert result.stderr.endswith(f"{command}: start one with: ptctl broker start\n")


@pytest.mark.parametrize("command", USER_COMMANDS)
def test_a_site_file_that_is_not_there_is_told(home: Path, run: Run, command: str) -> None:
    (home / "t.jsonl").write_text('{"input":"a","target":"b"}\n')
    words = WORDS[command]
    result = run(command, *words, "--site-file=none.toml")
    assert result.exit_code == 1
    assert "none.toml: no such site file" in result.stderr


SITE = """
cluster = "lab"
[models.tiny]
path = "{path}"
[pools.tiny]
model = "tiny"
"""


def test_check_tells_every_mistake_with_its_line(home: Path, run: Run) -> None:
    (home / "model").mkdir()
    (home / "bad.toml").write_text('cluster = "a b"\n[broker]\nlog_level = "LOUD"\nunknown = 1\n')
    result = run("ptctl", "check", "bad.toml")
    assert result.exit_code == 1
    assert [line.split(" ")[0] for line in result.stdout.splitlines()] == ["bad.toml:1:", "bad.toml:3:", "bad.toml:4:"]
    assert run("ptctl", "check").exit_code == 1
    assert run("ptctl", "nonsense").exit_code == 2


def test_render_prints_the_job_script_of_a_pool_and_submits_nothing(home: Path, run: Run) -> None:
    (home / "site.toml").write_text(SITE.format(path=home) + 'partition = "gpu"\n')
    result = run("ptctl", "render", "tiny", "--site-file=site.toml")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("#!") and "#SBATCH --partition=gpu" in result.stdout
    missing = run("ptctl", "render", "other", "--site-file=site.toml")
    assert missing.exit_code == 1 and "other" in missing.stderr


@pytest.mark.parametrize("command", USER_COMMANDS)
def test_a_login_command_imports_nothing_heavy(broker: Any, home: Path, command: str, row: Row) -> None:
    """Asked in a process of its own, after a whole call with a broker's answer."""
    (home / "t.jsonl").write_text('{"input":"a","target":"b"}\n')
    words = WORDS[command]
    broker.answer = lambda message: ErrorReply(code="Refused", message="no")
    program = (
        "import sys, importlib\n"
        f"main = importlib.import_module('slurm_plugin.cli.{command}').main\n"
        "try:\n"
        f"    main({words!r}, prog_name={command!r})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 4, end.code\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.split())
    assert {"click", "zmq", "msgspec"} <= modules
    heavy = {
        "torch",
        "numpy",
        "transformers",
        "peft",
        "jinja2",
        "tenacity",
        "asyncio",
        "sqlite3",
        "tuner",
        "bank",
        "tomllib",
    }
    assert not modules & heavy


def test_help_does_without_the_network_library(home: Path) -> None:
    program = (
        "import sys\n"
        "from slurm_plugin.cli.ptbatch import main\n"
        "try:\n"
        "    main(['--help'], prog_name='ptbatch')\n"
        "except SystemExit:\n"
        "    print('zmq' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr == "False\n"


def test_a_folder_of_the_users_named_as_ours_is_never_imported(home: Path) -> None:
    for name in ("broker", "bank", "slurm_plugin", "click"):
        (home / name).mkdir()
        (home / name / "__init__.py").write_text("raise SystemExit('imported the wrong folder')")
    program = str(Path(sys.executable).parent / "ptqueue")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, cwd=home)
    assert (done.returncode, done.stdout) == (0, f"prompttuner {__version__}\n")

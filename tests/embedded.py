"""The embedded default for tests: one user's broker with local workers, in folders of its own, without Slurm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.processes import forks, kill, supervisors, trainers, until
from tests.site import BIN, WORLD

_ROOMS = ("bank", "broker", "tuner", "slurm_plugin", "click", "msgspec", "zmq")
_POISON = 'open({marker!r}, "a").write(__name__ + "\\n")\nraise ImportError("a folder of the user was imported")\n'


class Embedded:
    """A home, a run and a state directory, and a working directory that holds traps: packages named as ours are."""

    def __init__(self, site: str = "") -> None:
        """`site` is the text of a site file; without one, everything is the embedded default's."""
        self.dir = Path(tempfile.mkdtemp(prefix="pt-e2e-", dir="/tmp"))  # a short path: sockets have to fit
        self.cwd = self.dir / "work"
        self.trapped = self.dir / "trapped"
        self.state_dir = self.dir / "state"
        for name in _ROOMS:
            (self.cwd / name).mkdir(parents=True)
            (self.cwd / name / "__init__.py").write_text(_POISON.format(marker=str(self.trapped)), encoding="utf-8")
        for folder in ("home", "conf"):
            (self.dir / folder).mkdir()
        if site:
            (self.dir / "conf" / "site.toml").write_text(site, encoding="utf-8")

    @property
    def env(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("LANG", "TZ", "CI") if name in os.environ}
        return kept | {
            "PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.dir / "home"),
            "PROMPTTUNER_RUN_DIR": str(self.dir / "run"),
            "PROMPTTUNER_STATE_DIR": str(self.state_dir),
            "PROMPTTUNER_CONF_DIR": str(self.dir / "conf"),
            "OMP_NUM_THREADS": "1",
        }

    def task(self, name: str, part: str = "train") -> Path:
        return WORLD / "tasks" / f"{name}.{part}.jsonl"

    def run(
        self,
        command: str,
        *args: str | Path,
        code: int | None = 0,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Runs one of our commands in the working directory with the traps; fails unless it ends with `code` (None:
        any)."""
        done = subprocess.run(
            [str(BIN / command), *map(str, args)],
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=self.cwd,
            env=self.env | dict(env or {}),
        )
        words = f"{command} {' '.join(map(str, args))}"
        assert code is None or done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, command: str, *args: str | Path) -> dict[str, Any]:
        """The document that a command prints with --json."""
        document: dict[str, Any] = json.loads(self.run(command, *args, "--json").stdout)
        assert document["schema"] == "pt/1"
        return document

    def submit(self, task: str, *options: str, model: str = "tiny") -> int:
        """Submits without waiting; the request's id."""
        files = (f"--train={self.task(task)}", f"--eval={self.task(task, 'eval')}")
        return int(self.run("ptbatch", f"--model={model}", *files, "--parsable", "-Q", *options).stdout)

    def row(self, request_id: int) -> dict[str, Any]:
        """The request as accounting has it."""
        [row] = self.json("ptacct", "-j", str(request_id))["requests"]
        return dict(row)

    def rows(self) -> list[dict[str, Any]]:
        """Every request of today."""
        return list(self.json("ptacct", "-S", "now-1days")["requests"])

    def wait(self, ids: list[int], timeout_s: float = 120) -> list[dict[str, Any]]:
        """The requests as they ended."""

        def ended() -> list[dict[str, Any]]:
            found = {row["id"]: row for row in self.rows()}
            return [found[i] for i in ids] if all(found[i]["end_unix_s"] for i in ids) else []

        return until(ended, timeout_s, f"requests {ids} end; broker log: {self.log()}")

    def start(self, *options: str) -> None:
        self.run("ptctl", "broker", "start", *options)

    def start_warm(self, *options: str, workers: int = 1) -> None:
        self.start(*options)
        self.until_warm(workers)

    def until_warm(self, workers: int = 1) -> list[dict[str, Any]]:
        """The warm workers, once there are as many."""

        def warm() -> list[dict[str, Any]]:
            found = [a for a in self.allocations() if a["state"] == "warm"]
            return found if len(found) >= workers else []

        return until(warm, 90, f"{workers} warm workers; broker log: {self.log()}")

    def allocations(self) -> list[dict[str, Any]]:
        pools = self.json("ptinfo")["pools"]
        return [allocation for pool in pools for allocation in pool["allocations"]]

    @property
    def broker_pid(self) -> int:
        return int((self.state_dir / "lock").read_text())

    def kill_broker(self) -> None:
        """kill -9; returns when the process is gone."""
        kill(self.broker_pid)

    def supervisors(self) -> dict[int, str]:
        """The worker processes of this broker: allocation name by pid."""
        return supervisors(self.dir)

    def trainers(self) -> dict[int, str]:
        """The training processes of this broker: allocation name by pid."""
        return trainers(self.dir)

    def forks(self) -> dict[int, str]:
        """The training processes and the parents that they are forked from: allocation name by pid."""
        return forks(self.dir)

    def log(self) -> str:
        file = self.state_dir / "broker.log"
        return file.read_text(errors="replace")[-3000:] if file.exists() else ""

    def down(self) -> None:
        """Ends whatever still runs, and removes the folders; the traps must not have been touched."""
        self.run("ptctl", "broker", "stop", code=None)
        for pid in (*self.supervisors(), *self.forks()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        was_trapped = self.trapped.read_text() if self.trapped.exists() else ""
        shutil.rmtree(self.dir, ignore_errors=True)
        assert not was_trapped, f"imported from the working directory: {was_trapped}"


def local_site(root: Path | str, *, workers: int = 2, floor: int | None = None, limits: str = "") -> str:
    """The text of a personal site file with local workers."""
    return "\n".join(
        [
            'mode = "personal"',
            'backend = "local"',
            "[limits]",
            limits,
            "[models.tiny]",
            f'path = "{root}"',
            "[pools.tiny]",
            'model = "tiny"',
            f"min_workers = {workers if floor is None else floor}",
            f"max_workers = {workers}",
            "",
        ]
    )

"""PromptTuner installed on a test cluster: site file, keys, folders, and a broker run by the service user."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cluster import Cluster
from tests.processes import supervisors, until

__all__ = ["BIN", "WORLD", "Site", "until"]

BIN = Path(sys.executable).parent
WORLD = Path(__file__).resolve().parent.parent / "examples" / "small_world"
_START_TIMEOUT_S = 60.0
_POOL: dict[str, object] = {
    "model": "tiny",
    "partition": "normal",
    "gres": "gpu:h100:1",
    "gpus_per_worker": 1,
    "cpus_per_worker": 1,
    "mem_mb": 2000,
    "time_limit": "2h",
    "min_workers": 1,
    "max_workers": 3,
    "idle_window": "20s",
}


class Site:
    """One site on one cluster. With root: a service user and several users; rootless: one user's personal broker."""

    def __init__(
        self,
        cluster: Cluster,
        pool: Mapping[str, object] | None = None,
        *,
        name: str = "prompttuner",
        more_pools: Mapping[str, Mapping[str, object]] | None = None,
        slurm: Sequence[str] = (),
        personal: str | None = None,
    ) -> None:
        """`pool` overrides keys of the pool `tiny`, `more_pools` adds others with overrides of the same keys; `slurm`
        are lines of that table. Sites of several `name`s may stand side by side. `personal` names the user of a
        cluster with several whose own broker this is.
        """
        self.cluster = cluster
        self.dir = cluster.dir / name
        self.mode = "personal" if cluster.rootless or personal else "site"
        self.service = None if cluster.rootless else personal or "prompttuner"  # who runs the broker
        self._broker: subprocess.Popen[str] | None = None
        pools = {"tiny": {**_POOL, **(pool or {})}}
        pools |= {name: {**_POOL, **overrides} for name, overrides in (more_pools or {}).items()}
        self._lay_out(pools, slurm)

    def _lay_out(self, pools: Mapping[str, dict[str, object]], slurm: Sequence[str]) -> None:
        shutil.rmtree(self.dir, ignore_errors=True)
        for folder in (self.dir, self.dir / "conf"):
            folder.mkdir(mode=0o755)
            os.chmod(folder, 0o755)
        shutil.copytree(WORLD / "tiny", self.dir / "tiny")
        shutil.copytree(WORLD / "tasks", self.dir / "tasks")
        self.cluster.run("chmod", "-R", "a+rX", self.dir)
        self.private = self.dir / "service"  # the service user's alone
        self.private.mkdir(mode=0o700)
        if self.service:
            shutil.chown(self.private, self.service, self.service)
        self.site_file = self.dir / "conf" / "site.toml"
        self.site_file.write_text(self._toml(pools, slurm), encoding="utf-8")
        os.chmod(self.site_file, 0o644)

    def _toml(self, pools: Mapping[str, dict[str, object]], slurm: Sequence[str]) -> str:
        lines = [
            f'cluster = "{self.cluster.name}"',
            f'mode = "{self.mode}"',
            'backend = "slurm"',
            "[broker]",
            *(self._doors() if self.mode == "site" else []),
            f'state_dir = "{self.private / "state"}"',
            "[paths]",
            f'spool = "{self.private / "spool"}"',
            f'bank = "{self.private / "bank"}"',
            "[limits]",
            'heartbeat = "2s"',
            'worker_timeout = "30s"',
            'checkpoint = "1s"',
            "[slurm]",
            f'conf = "{self.cluster.slurm_conf}"',
            *slurm,
            "[models.tiny]",
            f'path = "{self.dir / "tiny"}"',
        ]
        for name, settings in pools.items():
            if self.mode == "site":
                settings.setdefault("account", "svc")
            lines += [f"[pools.{name}]", *(f"{key} = {_value(value)}" for key, value in settings.items())]
        return "\n".join([*lines, ""])

    def _doors(self) -> list[str]:
        key = self.private / "curve.secret"
        self.address = f"tcp://127.0.0.1:{_free_port()}"
        self.public_key = self.run("ptctl", "broker", "keygen", key, user=self.service).stdout.strip()
        return [
            f'listen = "{self.address}"',
            'worker_listen = "tcp://127.0.0.1:0"',
            f'public_key = "{self.public_key}"',
            f'secret_key_file = "{key}"',
            f'munge_socket = "{self.cluster.munge_socket}"',
            f'user = "{self.service}"',
        ]

    @property
    def env(self) -> dict[str, str]:
        env = {"PROMPTTUNER_CONF_DIR": str(self.dir / "conf"), "PATH": f"{BIN}:{os.environ['PATH']}"}
        return env | ({"PROMPTTUNER_RUN_DIR": str(self.private / "run")} if self.mode == "personal" else {})

    def task(self, name: str, part: str = "train") -> Path:
        """A data file of the small world that everyone may read."""
        return self.dir / "tasks" / f"{name}.{part}.jsonl"

    def run(
        self,
        command: str,
        *args: str | Path,
        user: str | None = None,
        check: bool = True,
        timeout: float = 120,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs one of our commands as a user of the cluster (None: as whoever calls)."""
        environment = {**self.env, **(env or {})}
        return self.cluster.run(BIN / command, *args, user=user, check=check, timeout=timeout, env=environment, cwd=cwd)

    def refused(
        self, code: int, command: str, *args: str | Path, user: str, env: Mapping[str, str] | None = None
    ) -> str:
        """Runs a command that must end with exit code `code`, and returns what it says on standard error."""
        done = self.run(command, *args, user=user, check=False, env=env)
        assert done.returncode == code, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
        assert f"{command}: error: " in done.stderr
        return done.stderr

    def json(self, command: str, *args: str | Path, user: str | None = None) -> dict[str, Any]:
        """The document that a command prints with --json."""
        document: dict[str, Any] = json.loads(self.run(command, *args, "--json", user=user).stdout)
        return document

    def submit(self, task: str, *options: str, user: str) -> int:
        """Submits without waiting; the request's id."""
        files = (f"--train={self.task(task)}", f"--eval={self.task(task, 'eval')}")
        return int(self.run("ptbatch", "--model=tiny", *files, "--parsable", "-Q", *options, user=user).stdout)

    def row(self, request_id: int, user: str) -> dict[str, Any]:
        """The request as accounting has it."""
        [row] = self.json("ptacct", "-j", str(request_id), user=user)["requests"]
        return dict(row)

    def wait(self, ids: Sequence[int], user: str, timeout_s: float = 120) -> list[dict[str, Any]]:
        """The requests as they ended, in the order of `ids`."""
        words = ",".join(map(str, ids))

        def ended() -> list[dict[str, Any]]:
            rows = {row["id"]: row for row in self.json("ptacct", "-j", words, user=user)["requests"]}
            return [rows[i] for i in ids] if all(rows[i]["end_unix_s"] for i in ids) else []

        return until(ended, timeout_s, lambda: f"requests {words} end; broker log: {self.log()}")

    def warm(self, pool: str = "tiny") -> list[dict[str, Any]]:
        """The warm allocations of a pool, as ptinfo has them."""
        return [a for a in self.allocations(pool) if a["state"] == "warm"]

    def allocations(self, pool: str = "tiny") -> list[dict[str, Any]]:
        pools = {row["name"]: row for row in self.json("ptinfo", user=self.service)["pools"]}
        return list(pools[pool]["allocations"])

    def jobs(self, pool: str = "tiny") -> dict[str, str]:
        """The pool's Slurm jobs that pend, run or end: state by id."""
        rows = self.cluster.run("squeue", "-h", "-o", "%A %T %j").stdout.splitlines()
        return {word[0]: word[1] for word in map(str.split, rows) if word[2].startswith(f"pt-{pool}-")}

    def supervisors(self) -> dict[int, str]:
        """The worker processes of this site: allocation name by pid."""
        return supervisors(self.dir)

    def start_broker(self) -> None:
        """Starts the broker as the service user and returns when it answers."""
        with open(self.dir / "broker.log", "a", encoding="utf-8") as log:
            self._broker = self.cluster.popen(
                sys.executable,
                "-I",
                "-m",
                "slurm_plugin.brokerd",
                user=self.service,
                env=self.env,
                stdout=log,
                stderr=log,
            )

        def answers() -> bool:
            assert self._broker is not None
            if self._broker.poll() is not None:
                raise RuntimeError(f"the broker ended: {self.log()}")
            return self.run("ptctl", "broker", "status", user=self.service, check=False).returncode == 0

        until(answers, _START_TIMEOUT_S, "the broker answers")

    @property
    def broker_pid(self) -> int:
        assert self._broker is not None
        return self._broker.pid

    def kill_broker(self) -> None:
        """kill -9."""
        assert self._broker is not None
        self._broker.kill()
        self._broker.wait()

    def log(self) -> str:
        return (self.dir / "broker.log").read_text(encoding="utf-8", errors="replace")[-4000:]

    def down(self) -> None:
        """Stops the broker and cancels what it holds."""
        if self._broker is not None and self._broker.poll() is None:
            self.run("ptctl", "broker", "stop", user=self.service, check=False)
            try:
                self._broker.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.kill_broker()
        folder = self.private / "spool" / "allocations"
        names = [each.name for each in folder.iterdir()] if folder.exists() else []
        if names:
            self.cluster.run("scancel", f"--name={','.join(names)}", user=self.service, check=False)


def _value(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

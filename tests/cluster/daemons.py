"""The cluster's daemons: how each is started, when it is ready, and how it is stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import process
from tests.cluster.config import NODES, Layout
from tests.cluster.errors import ClusterError
from tests.cluster.packages import program
from tests.cluster.process import Process

NAMES = ("munged", "mariadbd", "slurmdbd", "slurmctld", *(f"slurmd@{node}" for node in NODES))
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30


@dataclass(frozen=True)
class Recipe:
    """How to start one daemon, as whom (None: as this process), and how to see that it serves."""

    argv: list[str]
    user: str | None
    ready: Callable[[], bool]


class Daemons:
    """The daemons of one cluster. Each is known by a pid file of ours, so any process can stop what another started."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def find(self, name: str) -> Process | None:
        """The daemon's process if it runs, else None. Raises ClusterError for a name that is no daemon's."""
        if name not in NAMES:
            raise ClusterError(f"no daemon {name!r} in the cluster; there are: {' '.join(NAMES)}")
        found = process.read_pid(self._pid_file(name))
        return found if found is not None and found.alive() else None

    def launch(self, name: str) -> None:
        """Start the daemon unless it runs, without waiting for it to serve."""
        if self.find(name):
            return
        recipe = self._recipe(name)
        started = process.spawn(recipe.argv, self._layout.daemon_env, recipe.user, self._output(name))
        process.write_pid(self._pid_file(name), started)

    def wait_ready(self, name: str) -> None:
        """Return when the daemon serves. Raises ClusterError with the end of its log when it ends or takes too long."""
        recipe = self._recipe(name)

        def ready() -> bool:
            if self.find(name) is None:
                raise ClusterError(f"{name} ended while it was starting")
            return recipe.ready()

        try:
            process.wait_until(ready, START_TIMEOUT_S, f"{name} to be ready")
        except ClusterError as error:
            logs = self._layout.dir / "log"
            raise ClusterError(f"{error}. The end of its log in {logs}:\n{self._log_tail(name)}") from None

    def stop(self, name: str) -> None:
        """End the daemon in its orderly way (SIGTERM) and return when it has ended, killed if it would not."""
        daemon = self.find(name)
        if daemon is None:
            return
        daemon.signal(signal.SIGTERM)
        daemon.signal(signal.SIGCONT)  # a stopped process takes no other signal
        try:
            process.wait_until(lambda: not daemon.alive(), STOP_TIMEOUT_S, f"{name} to end")
        except ClusterError:
            self.kill(name, signal.SIGKILL)

    def kill(self, name: str, number: int) -> None:
        """Send a signal to the daemon, as a fault would; after SIGKILL, return when it is gone.

        Raises ClusterError when it does not run.
        """
        daemon = self.find(name)
        if daemon is None:
            raise ClusterError(f"{name} does not run, so it cannot be sent signal {number}")
        daemon.signal(number)
        if number == signal.SIGKILL:
            process.wait_until(lambda: not daemon.alive(), STOP_TIMEOUT_S, f"{name} to end after SIGKILL")

    def kill_everything(self) -> None:
        """End all daemons, job steps and job processes of this cluster at once; nothing of it is left on return."""

        def alive() -> list[Process]:
            known = [daemon for daemon in map(self.find, NAMES) if daemon]
            return list({*known, *process.marked(self._layout.marks)})

        process.kill_all(alive)

    def _pid_file(self, name: str) -> Path:
        return self._layout.dir / f"pids/{name}"

    def _output(self, name: str) -> Path:
        return self._layout.dir / f"log/{name}.out"

    def _log_tail(self, name: str) -> str:
        output = self._output(name)
        logs = [log for log in (output, output.with_suffix(".log")) if log.exists()]
        return "\n".join(line for log in logs for line in log.read_text(errors="replace").splitlines()[-8:])

    def _recipe(self, name: str) -> Recipe:
        if name.startswith("slurmd@"):
            return self._slurmd(name.removeprefix("slurmd@"))
        return {
            "munged": self._munged,
            "mariadbd": self._mariadbd,
            "slurmdbd": self._slurmdbd,
            "slurmctld": self._slurmctld,
        }[name]()

    def _munged(self) -> Recipe:
        run, log = self._layout.dir / "run", self._layout.dir / "log"
        argv = [
            program("munged"),
            "--foreground",
            "--force",
            f"--socket={self._layout.munge_socket}",
            f"--key-file={self._layout.munge_key}",
            f"--pid-file={run}/munged.pid",
            f"--seed-file={run}/munged.seed",
            f"--log-file={log}/munged.log",
        ]
        return Recipe(argv, self._service_user(), lambda: _accepts_unix(self._layout.munge_socket))

    def _mariadbd(self) -> Recipe:
        d, port = self._layout.dir, self._layout.ports["mariadbd"]
        # Durability across a power cut is not wanted of a cluster that lives for minutes; speed is.
        argv = [
            program("mariadbd"),
            "--no-defaults",
            f"--datadir={d}/db",
            f"--tmpdir={d}/db",
            f"--socket={d}/run/mariadb.sock",
            f"--pid-file={d}/run/mariadbd.pid",
            "--bind-address=127.0.0.1",
            f"--port={port}",
            "--skip-name-resolve",
            "--host-cache-size=0",
            f"--init-file={self._layout.database_init}",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-doublewrite=0",
            "--innodb-log-file-size=8M",
            "--innodb-buffer-pool-size=64M",
            "--performance-schema=OFF",
        ]
        return Recipe(argv, self._service_user(), lambda: _greets_tcp(port))

    def _slurmdbd(self) -> Recipe:
        port = self._layout.ports["slurmdbd"]
        return Recipe([program("slurmdbd"), "-D"], self._service_user(), lambda: _accepts_tcp(port))

    def _slurmctld(self) -> Recipe:
        argv = [program("slurmctld"), "-D", "-f", str(self._layout.slurm_conf)]
        return Recipe(argv, self._service_user(), self._controller_answers)

    def _slurmd(self, node: str) -> Recipe:
        argv = [program("slurmd"), "-D", "-N", node, "-f", str(self._layout.slurm_conf)]
        return Recipe(argv, None, lambda: _accepts_tcp(self._layout.ports[node]))

    def _service_user(self) -> str | None:
        return self._layout.service_user if os.geteuid() == 0 else None

    def _controller_answers(self) -> bool:
        ping = subprocess.run(
            [program("scontrol"), "ping"], env=self._layout.env, capture_output=True, text=True, timeout=60
        )
        return " is UP" in ping.stdout


def _accepts_unix(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def _accepts_tcp(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _greets_tcp(port: int) -> bool:
    """Whether a server speaks first on that port: MariaDB's port is open some time before it answers."""
    with socket.socket() as client:
        client.settimeout(5)
        try:
            client.connect(("127.0.0.1", port))
            return bool(client.recv(1))
        except OSError:
            return False

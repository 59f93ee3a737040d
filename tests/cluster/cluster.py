"""`Cluster`: bring up, use, break and take down one Slurm cluster on this machine."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.cluster import config, packages, setup
from tests.cluster.config import NODES, Layout
from tests.cluster.daemons import NAMES, Daemons
from tests.cluster.errors import ClusterError
from tests.cluster.packages import program
from tests.cluster.process import wait_until

_READY = "ready"  # the file that ends a first bring-up: accounts are made, all daemons served


class Cluster:
    """A running cluster in a directory. Make one by `up` or `attach`; several may live side by side."""

    daemons = NAMES
    nodes = NODES

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._daemons = Daemons(layout)
        self.dir = layout.dir
        self.slurm_conf = layout.slurm_conf
        self.munge_socket = layout.munge_socket
        self.rootless = layout.rootless
        self.name = layout.name

    @classmethod
    def up(cls, directory: str | Path, rootless: bool | None = None) -> Cluster:
        """Bring the cluster of this directory up, and return when its four nodes are idle or at work.

        A directory that is not there, or is empty, gets a new cluster; daemons that have ended are started again; a
        cluster that is up stays as it is. `rootless` None means: as root with the users alice, bob and prompttuner,
        and otherwise everything as the one user that calls.
        Raises MissingPackages, and ClusterError with the end of the log when a daemon does not come up; what was
        started for a new cluster is then ended again, and its directory left for reading.
        """
        as_root = os.geteuid() == 0
        wanted = (not as_root) if rootless is None else rootless
        if wanted == as_root:
            raise ClusterError(
                "a rootless cluster is brought up by an ordinary user: `runuser -u alice -- ...`"
                if as_root
                else "a cluster with several users needs root; otherwise take a rootless one"
            )
        path = Path(directory).resolve()
        setup.check_directory(path, wanted)
        packages.ensure_installed()
        with _lock(path, create=True):
            cluster = cls._existing(path) or cls._new(path, wanted)
            if cluster.rootless != wanted:
                raise ClusterError(
                    f"the cluster in {path} was made {'without' if cluster.rootless else 'with'} root; "
                    "take it down first, or take another directory"
                )
            cluster._start_all()
        return cluster

    @classmethod
    def attach(cls, directory: str | Path) -> Cluster:
        """The cluster that was brought up in this directory before. Raises ClusterError when there is none."""
        path = Path(directory).resolve()
        marker = path / setup.MARKER
        try:
            owner, text = marker.stat().st_uid, marker.read_text()
        except OSError as error:
            raise ClusterError(f"no cluster in {path} ({error.strerror}); bring one up there first") from None
        if owner not in (0, os.geteuid()):
            raise ClusterError(f"the cluster in {path} is not yours but uid {owner}'s; take another directory")
        return cls(Layout.from_json(json.loads(text)))

    def down(self) -> None:
        """End every process of the cluster at once, its jobs included, and remove its directory."""
        with suppress(FileNotFoundError), _lock(self.dir, create=False):
            if (self.dir / setup.MARKER).stat().st_uid != os.geteuid():
                raise ClusterError(f"the cluster in {self.dir} is another user's: who brought it up takes it down")
            self._daemons.kill_everything()
            setup.remove(self.dir)

    def status(self) -> dict[str, int | None]:
        """Each daemon's pid, None for one that does not run."""
        found = {name: self._daemons.find(name) for name in NAMES}
        return {name: daemon.pid if daemon else None for name, daemon in found.items()}

    def start(self, daemon: str) -> None:
        """Start one daemon unless it runs, and return when it serves."""
        self._daemons.launch(daemon)
        self._daemons.wait_ready(daemon)

    def stop(self, daemon: str) -> None:
        """End one daemon in its orderly way, and return when it has ended."""
        self._daemons.stop(daemon)

    def kill(self, daemon: str, number: int = signal.SIGKILL) -> None:
        """Send one daemon a signal; after SIGKILL, return when it is gone. Raises ClusterError when it does not run."""
        self._daemons.kill(daemon, number)

    def wait_nodes(self, timeout_s: float = 60) -> None:
        """Return when all four nodes answer their controller; one that was drained on purpose counts too."""
        states: list[str] = []

        def answer() -> bool:
            states[:] = self.run("sinfo", "-h", "-N", "-p", "normal", "-o", "%T", check=False).stdout.split()
            return len(states) == len(NODES) and not any(
                state.startswith(("down", "fail", "unk")) or state.endswith("*") for state in states
            )

        try:
            wait_until(answer, timeout_s, "the four nodes to be up", poll_s=0.1)
        except ClusterError as error:
            raise ClusterError(f"{error}: they are {' '.join(states) or 'not told'}; see {self.dir}/log") from None

    def home(self, user: str | None = None) -> Path:
        """The home directory of a user of the cluster (None: who calls); where that is not there, the cluster's."""
        home = Path(self._account(user).pw_dir)
        return home if home.is_dir() else self.dir

    def env(self, user: str | None = None) -> dict[str, str]:
        """The whole environment in which a user of the cluster runs Slurm's commands; no other SLURM_* leaks in."""
        account = self._account(user)
        return self._layout.env | {
            "HOME": str(self.home(user)),
            "USER": account.pw_name,
            "LOGNAME": account.pw_name,
            "SHELL": account.pw_shell or "/bin/sh",
        }

    def run(
        self,
        *argv: str | Path,
        user: str | None = None,
        check: bool = True,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
        cwd: str | Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of the cluster and return its output as text.

        `env` is added to the environment of `env()`; `cwd` is the user's home unless given; `timeout` is in seconds.
        Raises ClusterError with its standard error when it fails and `check` is set, and subprocess.TimeoutExpired.
        """
        command = [str(word) for word in argv]
        options = self._as(user, env, cwd) | ({"stdin": subprocess.DEVNULL} if input is None else {"input": input})
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command, timeout=timeout, capture_output=True, text=True, **options
        )
        if check and done.returncode != 0:
            raise ClusterError(
                f"`{' '.join(command)}` as {self._account(user).pw_name} ended with {done.returncode}: "
                f"{(done.stderr or done.stdout).strip()[-2000:]}"
            )
        return done

    def popen(
        self,
        *argv: str | Path,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start a command as `run` does, and return it running. `options` are Popen's, such as stdout and stderr."""
        return subprocess.Popen([str(word) for word in argv], text=True, **self._as(user, env, cwd), **options)

    @classmethod
    def _existing(cls, path: Path) -> Cluster | None:
        """The whole cluster in this directory; None when it is empty. A half-made one is cleared away."""
        if not any(path.iterdir()):
            return None
        cluster = cls.attach(path) if (path / setup.MARKER).exists() else None
        if cluster is None:
            raise ClusterError(f"{path} is not empty and holds no cluster; take another directory")
        if not (path / _READY).exists():
            cluster._daemons.kill_everything()
            setup.clear(path)
            return None
        return cluster

    @classmethod
    def _new(cls, path: Path, rootless: bool) -> Cluster:
        path.chmod(0o755)
        cluster = cls(setup.new_layout(path, rootless))
        setup.make_directory(cluster._layout)
        return cluster

    def _start_all(self) -> None:
        first = not (self.dir / _READY).exists()
        try:
            self._start_accounting(first)
            for name in NAMES:
                self._daemons.launch(name)
            for name in NAMES:
                self._daemons.wait_ready(name)
            self.wait_nodes()
        except BaseException:
            if first:
                with suppress(ClusterError):
                    self._daemons.kill_everything()
            raise
        (self.dir / _READY).touch()

    def _start_accounting(self, first: bool) -> None:
        """MUNGE, then the database, then slurmdbd and the accounts: slurmctld must find those when it starts."""
        self._daemons.launch("munged")
        if first:
            setup.make_database(self._layout)
        for name in ("munged", "mariadbd", "slurmdbd"):
            self.start(name)
        if first:
            # One sacctmgr for all commands: each call of it costs a third of a second.
            commands = "\n".join(config.accounts(self._layout)) + "\n"
            self.run(program("sacctmgr"), "-i", "-Q", input=commands, timeout=120)

    def _as(self, user: str | None, env: Mapping[str, str] | None, cwd: str | Path | None) -> dict[str, Any]:
        """Popen's arguments for a command of that user. Privileges are dropped whole: uid, gid and groups."""
        account = self._account(user)
        options: dict[str, Any] = {"env": {**self.env(user), **(env or {})}, "cwd": str(cwd or self.home(user))}
        if account.pw_uid != os.geteuid():
            options |= {
                "user": account.pw_uid,
                "group": account.pw_gid,
                "extra_groups": os.getgrouplist(account.pw_name, account.pw_gid),
            }
        return options

    def _account(self, user: str | None) -> pwd.struct_passwd:
        own = pwd.getpwuid(os.geteuid())
        if user is None or user == own.pw_name:
            return own
        if self.rootless:
            raise ClusterError(f"the rootless cluster in {self.dir} has one user, {own.pw_name}, and no {user}")
        return pwd.getpwnam(user)


@contextmanager
def _lock(directory: Path, create: bool) -> Iterator[None]:
    """Keep others from bringing the same directory up or down meanwhile."""
    while True:
        if create:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # While this waited, the directory may have been removed, and made anew.
            if directory.exists() and os.path.samestat(os.fstat(descriptor), directory.stat()):
                yield
                return
        finally:
            os.close(descriptor)

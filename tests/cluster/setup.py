"""Making a cluster's directory: its layout, files, keys, devices, database and Unix users, before any daemon runs."""

from __future__ import annotations

import json
import os
import pwd
import random
import secrets
import shutil
import socket
import stat
import subprocess
from pathlib import Path

from tests.cluster import config
from tests.cluster.config import NODES, Layout
from tests.cluster.errors import ClusterError
from tests.cluster.packages import program, slurm_version
from tests.cluster.process import identity

USERS = ("alice", "bob", "prompttuner")
MARKER = "cluster.json"
_MAX_PATH = 80  # a Unix socket's path holds 107 bytes, and slurmstepd puts its own below spool/


def check_directory(directory: Path, rootless: bool) -> None:
    """Raise ClusterError when the directory cannot serve every user of the cluster, before anything is made."""
    if len(os.fsencode(directory)) > _MAX_PATH:
        raise ClusterError(
            f"{directory} is longer than {_MAX_PATH} bytes, too long for sockets in it; take a shorter one"
        )
    existing = [parent for parent in directory.parents if parent.exists()]
    closed = [parent for parent in existing if not parent.stat().st_mode & stat.S_IXOTH]
    if closed and not rootless:
        raise ClusterError(
            f"{closed[0]} may not be entered by others, so alice could not use {directory}; "
            "take a directory such as /var/tmp/NAME"
        )


def new_layout(directory: Path, rootless: bool) -> Layout:
    """A layout with ports that are free now."""
    service_user = pwd.getpwuid(os.geteuid()).pw_name if rootless else "slurm"
    host = socket.gethostname().partition(".")[0]
    return Layout(directory, service_user, rootless, host, dict(zip(config.PORT_NAMES, free_ports(), strict=True)))


def free_ports() -> list[int]:
    """As many free ports as daemons need, below the range from which the kernel gives ports to outgoing connections."""
    sockets: list[socket.socket] = []
    try:
        for port in random.sample(range(10000, 32000), 2000):
            candidate = socket.socket()
            try:
                candidate.bind(("", port))
            except OSError:
                candidate.close()
                continue
            sockets.append(candidate)
            if len(sockets) == len(config.PORT_NAMES):
                return [int(opened.getsockname()[1]) for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()
    raise ClusterError("found no free TCP ports between 10000 and 32000 on this machine")


def make_directory(layout: Layout) -> None:
    """Fill the directory. The marker comes first, so that a half-made one is known for ours and can be removed."""
    d = layout.dir
    write(d / MARKER, json.dumps(layout.to_json(), indent=2) + "\n", 0o644)
    for name in ("etc", "pids", "dev", "spool"):
        (d / name).mkdir(mode=0o755)
    for name, mode in (("run", 0o755), ("log", 0o755), ("state", 0o700), ("db", 0o700)):
        (d / name).mkdir()
        (d / name).chmod(mode)
        _give(layout, d / name)
    password = secrets.token_hex(16)
    write(layout.slurm_conf, config.slurm_conf(layout), 0o644)
    write(d / "etc/gres.conf", config.gres_conf(layout), 0o644)
    cgroup_conf = config.cgroup_conf(slurm_version())
    if cgroup_conf:
        write(d / "etc/cgroup.conf", cgroup_conf, 0o644)
    _secret(layout, d / "etc/slurmdbd.conf", config.slurmdbd_conf(layout, password))
    _secret(layout, layout.database_init, config.database_init_sql(password))
    _secret(layout, layout.munge_key, secrets.token_hex(64))
    for node in NODES:
        (d / "spool" / node).mkdir(mode=0o755)
        _make_gpus(d / "dev" / node)
    if not layout.rootless:
        make_users()


def make_database(layout: Layout) -> None:
    """Create MariaDB's own tables, for an administrator who is known by the Unix socket and needs no password."""
    d, user = layout.dir, layout.service_user
    command = [
        program("mariadb-install-db"),
        "--no-defaults",
        f"--datadir={d}/db",
        f"--tmpdir={d}/db",
        "--skip-name-resolve",
        "--skip-test-db",
        "--auth-root-authentication-method=socket",
        f"--auth-root-socket-user={user}",
        "--innodb-log-file-size=8M",
        "--innodb-flush-log-at-trx-commit=0",
        "--innodb-doublewrite=0",
    ]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command,
        cwd="/",
        env=layout.daemon_env,
        capture_output=True,
        text=True,
        timeout=300,
        **identity(user if os.geteuid() == 0 else None),
    )
    if done.returncode != 0:
        raise ClusterError(f"mariadb-install-db ended with {done.returncode}: {(done.stderr or done.stdout)[-800:]}")


def make_users() -> None:
    """Create the Unix users that are missing, with homes that only they may enter. They stay when the cluster goes."""
    for user in USERS:
        try:
            pwd.getpwnam(user)
        except KeyError:
            # The service user has a shell too: slurmd asks `su - USER -c env` for a job submitted with --export=NAMES.
            home = "/var/lib/prompttuner" if user == "prompttuner" else f"/home/{user}"
            command = [
                program("useradd"),
                "--create-home",
                "--home-dir",
                home,
                "--shell",
                "/bin/bash",
                "--user-group",
                user,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise ClusterError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr}") from None
            Path(home).chmod(0o700)


def remove(directory: Path) -> None:
    """Remove a cluster's directory. Raises ClusterError rather than removing anything that is none."""
    clear(directory)
    directory.rmdir()


def clear(directory: Path) -> None:
    """Remove what is in a cluster's directory, the marker last: an interrupted removal can be repeated."""
    marker = directory / MARKER
    if not marker.is_file():
        raise ClusterError(f"{directory} holds no {MARKER}: it is not a cluster's directory, and is left alone")
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry != marker:
            entry.unlink()
    marker.unlink()


def write(path: Path, text: str, mode: int) -> None:
    """Write a file that never had more permissions than `mode`, which is then exact."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(descriptor, "w") as file:
        os.fchmod(descriptor, mode)
        file.write(text)


def _secret(layout: Layout, path: Path, text: str) -> None:
    write(path, text, 0o600)
    _give(layout, path)


def _give(layout: Layout, path: Path) -> None:
    if os.geteuid() == 0:
        shutil.chown(path, layout.service_user, layout.service_user)


def _make_gpus(folder: Path) -> None:
    # Slurm wants a character device, or the job silently gets no CUDA_VISIBLE_DEVICES. It follows symbolic links, so
    # the null device will do: neither mknod nor a file system that allows devices is needed.
    folder.mkdir()
    for index in range(config.GPUS_PER_NODE):
        (folder / f"nvidia{index}").symlink_to("/dev/null")

"""`python tests/cluster install|up|down|status|env [--dir DIR] [--rootless]`: a Slurm cluster to try things out on."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

if __package__ in (None, ""):  # started by its path: the package's name needs the project's root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.cluster import Cluster, ClusterError
from tests.cluster.config import PARTITIONS
from tests.cluster.packages import ensure_installed


def main() -> int:
    options = _parser().parse_args()
    directory = Path(options.dir or _default_directory())
    try:
        if options.command == "install":
            ensure_installed()
            return 0
        if options.command == "up":
            return _up(directory, options.rootless)
        return {"down": _down, "status": _status, "env": _env}[options.command](directory)
    except (ClusterError, OSError) as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    description = "A real, ephemeral Slurm cluster on this machine."
    parser = argparse.ArgumentParser(prog="python tests/cluster", description=description)
    parser.add_argument("command", choices=("install", "up", "down", "status", "env"))
    parser.add_argument("--dir", help=f"the directory that holds all of it (default {_default_directory()})")
    parser.add_argument("--rootless", action="store_true", help="with `up`: everything as the one user who calls")
    return parser


def _default_directory() -> str:
    return "/var/tmp/prompttuner-cluster" + (f"-{os.geteuid()}" if os.geteuid() else "")


def _up(directory: Path, rootless: bool) -> int:
    was_up = _all_up(directory)
    cluster = Cluster.up(directory, rootless or None)
    news = "is already up" if was_up else "is up"
    print(f"The Slurm cluster {news} in {cluster.dir}: four nodes with two fake GPUs each.\n")
    print(_usage(cluster))
    return 0


def _usage(cluster: Cluster) -> str:
    users = "only you" if cluster.rootless else "alice (account teama), bob (teamb), prompttuner (svc, Operator)"
    example = "squeue" if cluster.rootless else "runuser -u alice -- squeue"
    command = f"python tests/cluster down --dir {shlex.quote(str(cluster.dir))}"
    return "\n".join(
        [
            _exports(cluster),
            f"{example}            # or sbatch, srun --gres=gpu:1, sacct ...",
            "",
            f"users:      {users}",
            f"partitions: {PARTITIONS[0]} (default, preempts), {PARTITIONS[1]} (requeued, 10 s of grace)",
            f"logs:       {cluster.dir}/log",
            f"take down:  {command}",
        ]
    )


def _exports(cluster: Cluster) -> str:
    return "\n".join(
        [
            f"export SLURM_CONF={shlex.quote(str(cluster.slurm_conf))}",
            f"export MUNGE_SOCKET={shlex.quote(str(cluster.munge_socket))}",
        ]
    )


def _down(directory: Path) -> int:
    if not directory.exists():
        print(f"There is no cluster in {directory}.")
        return 0
    Cluster.attach(directory).down()
    print(f"The cluster in {directory} is down and its directory removed.")
    return 0


def _status(directory: Path) -> int:
    cluster = Cluster.attach(directory)
    for name, pid in cluster.status().items():
        print(f"{name:<14} {pid or 'DOWN'}")
    if cluster.status()["slurmctld"]:
        print(cluster.run("sinfo", check=False).stdout, end="")
    return 0 if _all_up(directory) else 1


def _env(directory: Path) -> int:
    print(_exports(Cluster.attach(directory)))
    return 0


def _all_up(directory: Path) -> bool:
    try:
        return all(Cluster.attach(directory).status().values())
    except ClusterError:
        return False


if __name__ == "__main__":
    sys.exit(main())

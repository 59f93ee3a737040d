"""Which programs a cluster needs, the Debian packages that hold them, and their installation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping

from tests.cluster.errors import ClusterError, MissingPackages

# Daemons live in sbin, which is not on an ordinary user's PATH.
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# The plugins and libraries that a cluster needs are dependencies of these.
PACKAGE_OF_PROGRAM: Mapping[str, str] = {
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
    "slurmdbd": "slurmdbd",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "sacctmgr": "slurm-client",
    "useradd": "passwd",
}


def ensure_installed() -> None:
    """Return when every program of the cluster is there; as root on Debian, install what is missing.

    Raises MissingPackages, naming the packages, when that is not possible.
    """
    packages = missing_packages()
    if not packages:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise MissingPackages(
            f"the Slurm cluster needs packages that are not installed: {' '.join(packages)}; "
            f"as root, run: {' '.join(command)}"
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], env=environment, check=False, capture_output=True)
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    still_missing = missing_packages()
    if done.returncode != 0 or still_missing:
        raise MissingPackages(
            f"`{' '.join(command)}` ended with {done.returncode} and left out "
            f"{' '.join(still_missing) or 'nothing'}: {done.stderr.strip()[-500:]}"
        )


def missing_packages() -> list[str]:
    """The packages of those programs that are not on this machine, in a fixed order."""
    missing = {package for name, package in PACKAGE_OF_PROGRAM.items() if not shutil.which(name, path=SEARCH_PATH)}
    return sorted(missing)


def program(name: str) -> str:
    """The full path of a program of the cluster."""
    path = shutil.which(name, path=SEARCH_PATH)
    if path is None:
        raise MissingPackages(f"{name} is not installed; it comes with the package {PACKAGE_OF_PROGRAM[name]}")
    return path


def slurm_version() -> tuple[int, int]:
    """The installed Slurm's release, as (22, 5) for 22.05."""
    text = subprocess.run([program("slurmd"), "-V"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"(\d+)\.(\d+)", text)
    if not found:
        raise ClusterError(f"`slurmd -V` printed no version: {text.strip()!r}")
    return int(found[1]), int(found[2])

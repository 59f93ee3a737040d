"""A real, ephemeral Slurm cluster on this one machine, for the tests, the benchmarks and for trying things out.

munged, MariaDB, slurmdbd, slurmctld and four slurmd with two fake GPUs each, from the distribution's packages, all in
one directory: nothing under /etc, no systemd, no cgroups. Standard library only, so that any Python 3.11 runs it.
"""

from tests.cluster.cluster import Cluster
from tests.cluster.errors import ClusterError, MissingPackages

__all__ = ["Cluster", "ClusterError", "MissingPackages"]

"""What can go wrong with a cluster, as exceptions whose text a person can act on."""


class ClusterError(RuntimeError):
    """The cluster cannot do what was asked. The message says what, where, and what to do."""


class MissingPackages(ClusterError):
    """Slurm, MariaDB or MUNGE are not installed, and this process may not install them."""

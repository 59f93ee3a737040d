"""The plugin: the commands of login nodes, everything that knows Slurm, and the daemon that wires the rooms
together."""

__version__ = "0.1.0"

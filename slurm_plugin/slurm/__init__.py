"""Everything that talks to Slurm: client, throttle, templates, allocations."""

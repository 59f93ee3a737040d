"""The broker beside Slurm: what it knows, what it decides, what it remembers, how it is reached. It knows nothing of
Slurm."""

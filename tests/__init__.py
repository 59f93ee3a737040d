"""The tests, and what they stand on: a real Slurm cluster (`tests.cluster`)."""

"""Fixtures of the end-to-end tests: the real things that they run against."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster import Cluster, MissingPackages


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm cluster for the whole session; each worker process of pytest-xdist has its own, as tests break it.

    Skips where Slurm is not installed and cannot be; with CI set in the environment, that is a failure.
    """
    # Not below pytest's own directory, which other users, as alice, may not enter.
    directory = f"/var/tmp/prompttuner-test-{os.getpid():x}"
    try:
        cluster = Cluster.up(directory)
    except MissingPackages as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    yield cluster
    cluster.down()

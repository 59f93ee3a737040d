"""A fake cluster, and this plugin's client and provider on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker.allocations import AllocationOrder
from broker.protocol.config import Duration, PoolConfig, SlurmConfig
from slurm_plugin.slurm.client import CommandLineSlurm
from slurm_plugin.slurm.provider import SlurmProvider
from slurm_plugin.slurm.template import Launch
from slurm_plugin.slurm.throttle import Throttle
from tests.fake_slurm import FakeSlurm

REPO = Path(__file__).resolve().parents[4]


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm")


def client_of(slurm: FakeSlurm, timeout_s: float = 10.0, calls_per_s: float = 1000.0) -> CommandLineSlurm:
    config = SlurmConfig(conf=str(slurm.conf), bin_dir=str(slurm.bin), timeout=Duration(timeout_s))
    return CommandLineSlurm(config, Throttle(calls_per_s, 1000), first_wait_s=0.01)


@pytest.fixture
def client(slurm: FakeSlurm) -> CommandLineSlurm:
    return client_of(slurm)


def provider_of(client: CommandLineSlurm) -> SlurmProvider:
    return SlurmProvider(client, Launch(cluster="lab", template_dir=REPO / "job_templates"))


@pytest.fixture
def provider(client: CommandLineSlurm) -> SlurmProvider:
    return provider_of(client)


def order_of(folder: Path, name: str = "pt-small-1-x", **pool: Any) -> AllocationOrder:
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    return AllocationOrder(
        name=name,
        pool_name="small",
        pool=PoolConfig(model="tiny", **pool),
        worker_file=place / "worker.json",
        log_file=place / "worker.log",
    )

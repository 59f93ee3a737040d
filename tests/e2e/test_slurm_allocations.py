"""Allocations on a real Slurm: what the fake one is believed to do, Slurm does."""

from __future__ import annotations

import os
import pwd
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.allocations import AllocationOrder, JobReport, JobState
from broker.protocol.config import Duration, PoolConfig, SlurmConfig
from broker.protocol.errors import SlurmRejected, SlurmUnavailable, SlurmUnknown
from slurm_plugin.slurm.client import CommandLineSlurm
from slurm_plugin.slurm.provider import SlurmProvider
from slurm_plugin.slurm.template import Launch
from slurm_plugin.slurm.throttle import Throttle
from tests.cluster import Cluster

# Stands in for the worker: notes what it gets, ends with a status of its own on a signal.
WORKER = f"""#!{sys.executable} -IS
import os, signal, sys, time
def on(number, frame):
    print("SIGNAL", signal.Signals(number).name, flush=True)
    sys.exit(7 if number == signal.SIGUSR1 else 0)
signal.signal(signal.SIGTERM, on)
signal.signal(signal.SIGUSR1, on)
for name in sorted(os.environ):
    print("ENV", name, os.environ[name], flush=True)
print("ARGUMENTS", *sys.argv[1:], flush=True)
time.sleep(300)
"""


@pytest.fixture
def provider(cluster: Cluster, tmp_path: Path) -> Iterator[SlurmProvider]:
    (tmp_path / "python").write_text(WORKER)
    (tmp_path / "python").chmod(0o755)
    provider = new_provider(cluster, tmp_path)
    yield provider
    provider.cancel([report.job_id for report in provider.poll() if report.state is not JobState.ENDED])


def new_provider(cluster: Cluster, folder: Path, timeout_s: float = 20.0) -> SlurmProvider:
    conf = cluster.env()["SLURM_CONF"]
    client = CommandLineSlurm(SlurmConfig(conf=conf, timeout=Duration(timeout_s)), Throttle(50.0, 50))
    launch = Launch(cluster=f"test{os.getpid()}", python=str(folder / "python"), srun=client.srun, slurm_conf=conf)
    return SlurmProvider(client, launch)


def order_of(folder: Path, number: int = 1, **pool: Any) -> AllocationOrder:
    name = f"pt-small-{number}-{folder.name[-20:].replace('_', '-')}-{time.time_ns():x}"
    place = folder / name
    place.mkdir()
    settings: dict[str, Any] = {
        "partition": "normal",
        "mem_mb": 100,
        "cpus_per_worker": 2,
        "time_limit": Duration(600),
    } | pool
    return AllocationOrder(
        name=name,
        pool_name="small",
        pool=PoolConfig(model="tiny", **settings),
        worker_file=place / "worker.json",
        log_file=place / "worker.log",
    )


def reached(provider: SlurmProvider, name: str, wanted: Callable[[JobReport], bool], limit_s: float = 60) -> JobReport:
    until_mono_s = time.monotonic() + limit_s
    found: list[JobReport] = []
    while time.monotonic() < until_mono_s:
        found = [report for report in provider.poll() if report.name == name]
        if found and wanted(found[0]):
            return found[0]
        time.sleep(0.2)
    raise AssertionError(f"{name} never got there: {found}")


def running(report: JobReport) -> bool:
    return report.state is JobState.RUNNING


def ended(report: JobReport) -> bool:
    return report.state is JobState.ENDED


def log_with(order: AllocationOrder, word: str, limit_s: float = 60) -> str:
    until_mono_s = time.monotonic() + limit_s
    text = ""
    while time.monotonic() < until_mono_s:
        text = order.log_file.read_text() if order.log_file.exists() else ""
        if word in text:
            return text
        time.sleep(0.2)
    raise AssertionError(f"no {word} in the log: {text}")


def test_a_worker_gets_its_gpu_and_a_clean_environment_and_ends_when_cancelled(
    provider: SlurmProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_BROKER", "s")
    monkeypatch.setenv("SBATCH_PARTITION", "nosuch")
    order = order_of(tmp_path)
    job_id = provider.submit(order)
    assert provider.submit(order) == job_id
    report = reached(provider, order.name, running)
    assert (report.job_id, report.end_unix_s - report.start_unix_s) == (job_id, 600.0)
    assert abs(report.start_unix_s - time.time()) < 120
    log = log_with(order, "ARGUMENTS")
    seen = dict(line.split(" ", 2)[1:] for line in log.splitlines() if line.startswith("ENV ") and line.count(" ") > 1)
    assert f"ARGUMENTS -I -m tuner.worker {order.worker_file}" in log
    assert seen["CUDA_VISIBLE_DEVICES"] in ("0", "1")
    assert (seen["HF_HUB_OFFLINE"], seen["OMP_NUM_THREADS"], seen["SLURM_JOB_ID"]) == ("1", "2", job_id)
    assert seen["HOME"] == os.environ.get("HOME", pwd.getpwuid(os.geteuid()).pw_dir)
    assert "SECRET_OF_THE_BROKER" not in seen
    provider.cancel([job_id])
    assert reached(provider, order.name, ended).reason == "CANCELLED"
    assert "SIGNAL SIGTERM" in log_with(order, "SIGNAL")
    provider.cancel([job_id])


def test_the_warning_ahead_of_the_end_reaches_the_worker_and_its_status_the_job(
    provider: SlurmProvider, cluster: Cluster, tmp_path: Path
) -> None:
    order = order_of(tmp_path)
    job_id = provider.submit(order)
    log_with(order, "ARGUMENTS")
    cluster.run("scancel", "--batch", "--signal=USR1", job_id)
    assert reached(provider, order.name, ended).reason == "FAILED"
    assert "SIGNAL SIGUSR1" in log_with(order, "SIGNAL")
    rows = cluster.run("sacct", "-nPX", "-j", job_id, "-o", "ExitCode").stdout.split()
    assert rows == ["7:0"]


def test_a_preempted_worker_hears_of_it_while_it_still_has_its_grace(
    provider: SlurmProvider, cluster: Cluster, tmp_path: Path
) -> None:
    order = order_of(tmp_path, partition="preemptible", gpus_per_worker=2)
    provider.submit(order)
    log_with(order, "ARGUMENTS")
    preemptor = cluster.run(
        *("sbatch", "--parsable", "--output=/dev/null", "--nodes=4", "--gres=gpu:2", "--mem=50", "--wrap=sleep 30")
    ).stdout.strip()
    try:
        assert "SIGNAL SIGTERM" in log_with(order, "SIGNAL")
        assert reached(provider, order.name, ended).reason in ("COMPLETED", "PREEMPTED")
    finally:
        cluster.run("scancel", preemptor, check=False)


@pytest.mark.parametrize(
    "wrong",
    [{"account": "nosuch"}, {"partition": "nosuch"}, {"qos": "nosuch"}, {"gres": "gpu:nosuch:1"}, {"constraint": "no"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_slurm_refuses_is_rejected(provider: SlurmProvider, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(SlurmRejected):
        provider.submit(order_of(tmp_path, **wrong))


def test_a_controller_that_hangs_through_a_submission_makes_exactly_one_job(
    provider: SlurmProvider, cluster: Cluster, tmp_path: Path
) -> None:
    warm, order = order_of(tmp_path, 1), order_of(tmp_path, 2)
    provider.submit(warm)
    reached(provider, warm.name, running)
    hasty = new_provider(cluster, tmp_path, timeout_s=3.0)
    hasty.poll()
    cluster.kill("slurmctld", signal.SIGSTOP)
    resume = threading.Timer(60, cluster.kill, ["slurmctld", signal.SIGCONT])  # whatever happens here
    resume.start()
    try:
        with pytest.raises(SlurmUnknown):
            hasty.submit(order)
        with pytest.raises(SlurmUnavailable):
            hasty.poll()
    finally:
        resume.cancel()
        cluster.kill("slurmctld", signal.SIGCONT)
    job_id = reached_after(provider, order)
    jobs = cluster.run("squeue", "-h", f"--name={order.name}", "-t", "PD,R", "-o", "%A").stdout.split()
    assert jobs == [job_id]
    assert reached(hasty, warm.name, running).state is JobState.RUNNING


def reached_after(provider: SlurmProvider, order: AllocationOrder, limit_s: float = 60) -> str:
    """Submits until Slurm answers again, as the broker does."""
    until_mono_s = time.monotonic() + limit_s
    while True:
        try:
            return provider.submit(order)
        except (SlurmUnknown, SlurmUnavailable):
            assert time.monotonic() < until_mono_s


def test_accounts_are_those_of_slurms_associations(provider: SlurmProvider) -> None:
    accounts = provider.accounts()
    assert accounts is not None
    user = pwd.getpwuid(os.geteuid()).pw_name
    assert accounts[user].default in accounts[user].allowed

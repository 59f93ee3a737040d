"""Allocations as local processes: started once, found again, ended for sure."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.allocations import AllocationOrder, JobReport, JobState
from broker.protocol.config import PoolConfig
from broker.protocol.errors import SlurmRejected, SlurmUnavailable
from slurm_plugin.local import LocalProvider, machine_gpus

WORKER = """
import os, signal, sys, time
from pathlib import Path
from typing import Any
note = Path(sys.argv[-1]).parent
if (note / "stubborn").exists():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
names = ("PROMPTTUNER_JOB_ID", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID")
(note / "env").write_text(repr({name: os.environ.get(name) for name in names} | {"stdin": sys.stdin.read()}))
print("hello", flush=True)
if (note / "exit").exists():
    sys.exit(int((note / "exit").read_text()))
time.sleep(60)
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "allocations").mkdir()
    yield tmp_path / "allocations"
    cleaner = provider_of(tmp_path / "allocations", kill_after_s=0.0)
    cleaner.cancel([report.job_id for report in cleaner.poll()])
    eventually(lambda: all(report.state is JobState.ENDED for report in cleaner.poll()))


def provider_of(root: Path, kill_after_s: float = 0.3, gpus: tuple[str, ...] = ()) -> LocalProvider:
    return LocalProvider(root, kill_after_s, gpus, command=(sys.executable, "-I", str(root.parent / "worker.py")))


def order_of(root: Path, name: str = "pt-small-1-x", **pool: Any) -> AllocationOrder:
    place = root / name
    place.mkdir(exist_ok=True)
    return AllocationOrder(
        name=name,
        pool_name="small",
        pool=PoolConfig(model="tiny", **pool),
        worker_file=place / "worker.json",
        log_file=place / "worker.log",
    )


def eventually(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    until_mono_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until_mono_s, "it did not happen"
        time.sleep(0.02)


def ended(provider: LocalProvider) -> JobReport:
    found: list[JobReport] = []

    def some() -> bool:
        found.extend(one for one in provider.poll() if one.state is JobState.ENDED)
        return bool(found)

    eventually(some)
    return found[0]


def test_a_worker_runs_in_its_own_session_with_its_log_and_environment(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "57")
    provider = provider_of(root)
    order = order_of(root, cpus_per_worker=3)
    job_id = provider.submit(order)
    (report,) = provider.poll()
    assert (report.name, report.job_id, report.state) == (order.name, job_id, JobState.RUNNING)
    assert abs(report.start_unix_s - time.time()) < 60
    pid = int(job_id.split("-")[1])
    assert os.getsid(pid) == pid
    eventually(lambda: order.log_file.exists() and order.log_file.read_text() == "hello\n")
    assert order.log_file.stat().st_mode & 0o777 == 0o600
    seen = ast.literal_eval((order.worker_file.parent / "env").read_text())
    assert (seen["PROMPTTUNER_JOB_ID"], seen["SLURM_JOB_ID"]) == (order.name, None)
    assert (seen["OMP_NUM_THREADS"], seen["HF_HUB_OFFLINE"], seen["stdin"]) == ("3", "1", "")


def test_the_same_order_is_one_process(root: Path) -> None:
    provider = provider_of(root)
    assert len({provider.submit(order_of(root)) for _ in range(3)}) == 1
    assert len(provider.poll()) == 1


def test_a_restarted_broker_finds_its_workers_again_and_not_others(root: Path, tmp_path: Path) -> None:
    job_id = provider_of(root).submit(order_of(root))
    # For a moment within exec, Linux shows a process without its command line; no broker restarts that fast.
    eventually(lambda: bool(provider_of(root).poll()))
    again = provider_of(root)
    assert [report.job_id for report in again.poll()] == [job_id]
    assert again.submit(order_of(root)) == job_id
    assert provider_of(tmp_path / "elsewhere").poll() == []
    again.cancel([job_id])
    assert ended(again).job_id == job_id


@pytest.mark.parametrize(("code", "reason"), [(0, "exit code 0"), (3, "exit code 3")])
def test_an_ended_worker_is_told_once_with_its_status_and_leaves_no_zombie(root: Path, code: int, reason: str) -> None:
    provider = provider_of(root)
    order = order_of(root)
    (order.worker_file.parent / "exit").write_text(str(code))
    pid = int(provider.submit(order).split("-")[1])
    assert ended(provider).reason == reason
    assert provider.poll() == []
    assert not Path(f"/proc/{pid}").exists()


def test_a_cancelled_worker_gets_sigterm(root: Path) -> None:
    provider = provider_of(root, kill_after_s=60)
    job_id = provider.submit(order_of(root))
    provider.cancel([job_id])
    assert ended(provider).reason == f"signal {signal.SIGTERM.value}"
    provider.cancel([job_id])  # it ended already: no error


def test_a_worker_can_be_cancelled_by_its_allocations_name(root: Path) -> None:
    provider = provider_of(root)
    order = order_of(root)
    provider.submit(order)
    provider.cancel([order.name])
    assert ended(provider).name == order.name


def test_a_stubborn_worker_is_killed_after_the_grace_without_anyone_waiting(root: Path) -> None:
    provider = provider_of(root)
    order = order_of(root)
    (order.worker_file.parent / "stubborn").write_text("")
    job_id = provider.submit(order)
    eventually(lambda: order.log_file.read_text() == "hello\n")
    provider.cancel([job_id])
    assert ended(provider).reason == f"signal {signal.SIGKILL.value}"


def test_a_process_id_that_another_process_has_now_is_never_signalled(root: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as stranger:
        try:
            provider = provider_of(root)
            provider.cancel([f"local-{stranger.pid}-1"])
            assert stranger.poll() is None
        finally:
            stranger.kill()


@pytest.mark.parametrize("job_id", ["1", "local-1", "local--1-2", "", "57", "local-1-1\n"])
def test_what_is_no_local_job_is_refused(root: Path, job_id: str) -> None:
    with pytest.raises(SlurmRejected, match="local job id"):
        provider_of(root).cancel([job_id])


def test_a_folder_that_is_not_there_refuses_the_order(root: Path) -> None:
    order = order_of(root)
    order.worker_file.parent.rmdir()
    with pytest.raises(SlurmRejected, match="cannot start"):
        provider_of(root).submit(order)


def test_each_worker_has_gpus_of_its_own_also_after_a_restart(root: Path) -> None:
    provider_of(root, gpus=("0", "1", "2")).submit(order_of(root, "pt-a-1-x", gpus_per_worker=2))
    again = provider_of(root, gpus=("0", "1", "2"))
    with pytest.raises(SlurmUnavailable, match="1 free"):
        again.submit(order_of(root, "pt-a-2-x", gpus_per_worker=2))
    again.submit(order_of(root, "pt-a-3-x", gpus_per_worker=1))
    seen = [root / name / "env" for name in ("pt-a-1-x", "pt-a-3-x")]
    eventually(lambda: all(path.exists() and path.read_text() for path in seen))
    assert [ast.literal_eval(path.read_text())["CUDA_VISIBLE_DEVICES"] for path in seen] == ["0,1", "2"]


def test_the_machines_gpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert machine_gpus() == ("2", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine_gpus() == ()


def test_nobodys_accounts_are_enforced(root: Path) -> None:
    assert provider_of(root).accounts() is None

"""The worker's entry."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from broker.protocol.errors import ConfigError
from tuner.place import here, rss_mb, since_process_start_s
from tuner.worker import main, read_worker_file

GOOD = (
    b'{"allocation":"a","key":"k","broker":"ipc:///x","server_public_key":null,"pool":"p","model":"m","model_path":"/m",'
    b'"slots":4,"gpus":1,"checkpoint_dir":"/c","bank_dir":"/b","heartbeat_s":5,"orphan_timeout_s":9,"checkpoint_s":5,'
    b'"steps":true}'
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "worker.json"
    path.write_bytes(GOOD)
    path.chmod(0o600)
    return path


def test_a_private_file_is_read(file: Path) -> None:
    assert read_worker_file(file).key == "k"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_file_that_others_may_touch_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(ConfigError, match="0600"):
        read_worker_file(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_file_of_another_user_is_refused(file: Path) -> None:
    os.chown(file, 12345, 12345)
    with pytest.raises(ConfigError, match="private"):
        read_worker_file(file)


def test_a_link_is_refused(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_worker_file(link)


def test_a_malformed_file_is_refused_without_showing_it(file: Path) -> None:
    file.write_bytes(GOOD.replace(b'"slots":4', b'"slots":"secret"'))
    with pytest.raises(ConfigError, match=r"slots") as refusal:
        read_worker_file(file)
    assert "secret" not in str(refusal.value)


def test_wrong_usage_has_its_exit_code(caplog: pytest.LogCaptureFixture) -> None:
    assert main([]) == 2
    assert main(["/no/such/file"]) == 1
    assert "/no/such/file" in caplog.text


def test_the_workers_process_never_imports_torch() -> None:
    code = "import sys, tuner.worker, tuner.trainer; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-c", code]).returncode == 0


def test_the_place_is_what_slurm_tells() -> None:
    env = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1", "SLURM_STEP_GPUS": "2", "SLURM_JOB_END_TIME": "2000000000"}
    place = here(env)
    assert (place.job_id, place.restart_count, place.gpus, place.end_unix_s) == ("12", 1, "2", 2e9)
    assert here(env).incarnation != place.incarnation
    assert here({}).job_id == f"local-{os.getpid()}" and here({"PROMPTTUNER_JOB_ID": "l-1"}).job_id == "l-1"


def test_age_and_memory_are_measured_from_the_kernels_books() -> None:
    code = "import tuner.place as p; print(p.since_process_start_s())"
    began_s = time.monotonic()
    age_s = float(subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=True).stdout)
    assert 0 <= age_s <= time.monotonic() - began_s + 0.02
    assert since_process_start_s() > age_s
    assert rss_mb(os.getpid()) > 1 and rss_mb(2**22 + 1) == 0.0

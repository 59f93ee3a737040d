"""The command-line client, against executables that misbehave as told."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import cast

import pytest

from broker.protocol.config import SlurmConfig
from broker.protocol.errors import ConfigError, SlurmRejected, SlurmUnavailable, SlurmUnknown
from slurm_plugin.slurm.client import CommandLineSlurm, scrubbed_environment
from slurm_plugin.slurm.throttle import Throttle
from tests.fake_slurm import FakeSlurm

from .conftest import client_of

SCRIPT = "#!/bin/bash\n#SBATCH --job-name=pt-a\n#SBATCH --comment=c\n"
DOWN = {"stderr": "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", "code": 1}


def test_a_submission_returns_the_job_id(slurm: FakeSlurm, client: CommandLineSlurm) -> None:
    assert client.submit(SCRIPT) == slurm.jobs[0]["id"]
    assert slurm.jobs[0]["script"] == SCRIPT


def test_a_submission_that_did_not_arrive_is_tried_again(slurm: FakeSlurm, client: CommandLineSlurm) -> None:
    slurm.plan("sbatch", DOWN)
    client.submit(SCRIPT)
    assert slurm.count("sbatch") == 2
    assert len(slurm.jobs) == 1


@pytest.mark.parametrize(
    "word",
    [
        {"do": True, "code": 1},
        {"do": True, "stderr": "sbatch: error: Socket timed out on send/recv operation\n", "code": 1},
        {"do": True, "stdout": "\x00garbage \udcff\n"},
        {"do": True, "stdout": ""},
        {"do": True, "hang_s": 60},
    ],
    ids=["exit 1", "socket timed out", "garbage", "nothing", "hangs"],
)
def test_a_submission_whose_answer_is_lost_is_unknown_and_never_tried_again(
    slurm: FakeSlurm, word: dict[str, object]
) -> None:
    slurm.plan("sbatch", word)
    with pytest.raises(SlurmUnknown):
        client_of(slurm, timeout_s=1.0).submit(SCRIPT)
    assert slurm.count("sbatch") == 1


def test_a_refusal_is_not_tried_again(slurm: FakeSlurm, client: CommandLineSlurm) -> None:
    text = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified\n"
    slurm.plan("sbatch", {"stderr": text, "code": 1})
    with pytest.raises(SlurmRejected, match="Invalid account"):
        client.submit(SCRIPT)
    assert slurm.count("sbatch") == 1


def test_a_controller_that_stays_away_is_unavailable_after_a_few_tries(
    slurm: FakeSlurm, client: CommandLineSlurm
) -> None:
    slurm.plan("squeue", *[DOWN] * 10)
    with pytest.raises(SlurmUnavailable, match="Unable to contact"):
        client.queue()
    assert slurm.count("squeue") == 3


def test_a_command_that_hangs_is_ended_with_all_its_children(slurm: FakeSlurm, tmp_path: Path) -> None:
    marker = tmp_path / "survived"
    (slurm.bin / "squeue").write_text(f"#!/bin/sh\n(sleep 1; touch {marker}) &\nsleep 60\n")
    before_mono_s = time.monotonic()
    with pytest.raises(SlurmUnavailable, match="no answer in time"):
        client_of(slurm, timeout_s=0.5).queue()
    while time.monotonic() < before_mono_s + 2:
        assert not marker.exists()
        time.sleep(0.1)


def test_options_are_single_words_and_values_never_become_options(slurm: FakeSlurm, client: CommandLineSlurm) -> None:
    client.queue(name="--wrap=touch /tmp/x")
    argv = slurm.calls[0]["argv"]
    assert "--name=--wrap=touch /tmp/x" in argv
    assert f"--user={os.geteuid()}" in argv
    assert all(word.startswith("--") for word in argv)


def test_commands_get_no_inherited_slurm_settings_and_jobs_get_nearly_nothing(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = {
        "SLURM_JOB_ID": "1",
        "SLURM_TIME_FORMAT": "relative",
        "SBATCH_PARTITION": "scavenge",
        "SQUEUE_FORMAT": "%i",
        "SRUN_DEBUG": "9",
        "SACCT_FORMAT": "x",
        "CUDA_VISIBLE_DEVICES": "0",
        "MY_SECRET": "s",
    }
    for name, value in hostile.items():
        monkeypatch.setenv(name, value)
    client = client_of(slurm)
    client.queue()
    client.submit(SCRIPT)
    queue, submission = (call["env"] for call in slurm.calls)
    assert not (set(hostile) - {"MY_SECRET"}) & set(queue)
    assert (queue["TZ"], queue["SLURM_CONF"]) == ("UTC", str(slurm.conf))
    assert set(submission) <= {"HOME", "USER", "LOGNAME", "PATH", "LD_LIBRARY_PATH", "LC_ALL", "SLURM_CONF", "LC_CTYPE"}


def test_slurm_conf_of_the_environment_is_kept_unless_the_site_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "/a")
    assert scrubbed_environment(None)["SLURM_CONF"] == "/a"
    assert scrubbed_environment("/b")["SLURM_CONF"] == "/b"


def test_tools_are_found_once_and_a_later_path_changes_nothing(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{slurm.bin}:{os.environ['PATH']}")
    client = CommandLineSlurm(SlurmConfig(conf=str(slurm.conf)))
    monkeypatch.setenv("PATH", "/nonexistent")
    assert client.queue() == []
    assert client.srun == str(slurm.bin / "srun")


def test_missing_commands_are_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no sbatch, squeue, scancel, scontrol in"):
        CommandLineSlurm(SlurmConfig(bin_dir=str(tmp_path)))


def test_cancelling_forgives_jobs_that_ended_and_takes_many_in_few_calls(
    slurm: FakeSlurm, client: CommandLineSlurm
) -> None:
    slurm.set_jobs([{"id": str(n), "name": f"pt-{n}", "comment": "", "state": "RUNNING"} for n in range(1, 101)])
    client.cancel([str(n) for n in range(2, 121)])
    assert slurm.count("scancel") == 3
    assert [job["id"] for job in slurm.jobs if job["state"] == "RUNNING"] == ["1"]


def test_cancelling_anothers_job_is_refused(slurm: FakeSlurm, client: CommandLineSlurm) -> None:
    text = "scancel: error: Kill job error on job id 7: Access/permission denied\n"
    slurm.plan("scancel", {"stderr": text, "code": 1})
    with pytest.raises(SlurmRejected, match="permission denied"):
        client.cancel(["7"])


def test_all_calls_and_retries_share_the_bucket(slurm: FakeSlurm) -> None:
    taken: list[int] = []

    class Counting:
        def take(self) -> float:
            taken.append(1)
            return 0.0

    client = CommandLineSlurm(SlurmConfig(conf=str(slurm.conf), bin_dir=str(slurm.bin)), cast(Throttle, Counting()))
    slurm.plan("squeue", DOWN)
    client.queue()
    client.history(ids=["1"], since_unix_s=0.0)
    client.cancel(["1"])
    client.submit(SCRIPT)
    assert len(taken) == len(slurm.calls) == 5


def test_accounting_is_always_asked_with_a_start_time_and_at_most_fifty_ids(
    slurm: FakeSlurm, client: CommandLineSlurm
) -> None:
    client.history(ids=[str(n) for n in range(1, 200)], since_unix_s=1795166592.0)
    argv = slurm.calls[0]["argv"]
    assert "--starttime=2026-11-20T09:23:12" in argv
    (ids,) = [word for word in argv if word.startswith("--jobs=")]
    assert len(ids.split(",")) == 50


def test_five_thousand_jobs_are_read(slurm: FakeSlurm, client: CommandLineSlurm) -> None:
    slurm.set_jobs([{"id": str(n), "name": f"pt-{n}", "comment": "x", "state": "PENDING"} for n in range(5000)])
    assert len(client.queue()) == 5000
    assert slurm.count("squeue") == 1


def test_associations_of_this_cluster_only(slurm: FakeSlurm, client: CommandLineSlurm) -> None:
    slurm.set_answers("sacctmgr", "alice|a|a|lab\nalice|a|b|lab\nalice|a|c|other\nroot|root||\nbroken|\n")
    found = client.associations("lab")
    assert found is not None
    assert [(one.user, one.account, one.default) for one in found] == [("alice", "a", True), ("alice", "b", False)]

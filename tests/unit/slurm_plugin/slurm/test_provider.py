"""Allocations as Slurm jobs: one job for each name, whatever Slurm answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker.allocations import JobState
from broker.protocol.errors import SlurmRejected, SlurmUnavailable, SlurmUnknown
from slurm_plugin.slurm.provider import SlurmProvider
from tests.fake_slurm import TOOLS, FakeSlurm

from .conftest import client_of, order_of, provider_of

OURS = "prompttuner cluster=lab pool=small"
LOST_ANSWERS: list[dict[str, Any]] = [
    {"do": True, "code": 1},
    {"do": True, "stderr": "sbatch: error: Socket timed out on send/recv operation\n", "code": 1},
    {"do": True, "stdout": "lorem ipsum\n"},
    {"do": True, "hang_s": 60},
]


def job(job_id: str, state: str, name: str = "pt-small-1-x", **fields: Any) -> dict[str, Any]:
    return {"id": job_id, "name": name, "comment": OURS, "state": state, "node": "n1", **fields}


@pytest.mark.parametrize("word", LOST_ANSWERS, ids=["exit 1", "socket timed out", "garbage", "hangs"])
def test_a_job_whose_answer_was_lost_is_found_by_its_name(
    slurm: FakeSlurm, tmp_path: Path, word: dict[str, Any]
) -> None:
    slurm.plan("sbatch", word)
    job_id = provider_of(client_of(slurm, timeout_s=1.0)).submit(order_of(tmp_path))
    assert [job["id"] for job in slurm.jobs] == [job_id]


@pytest.mark.parametrize("word", LOST_ANSWERS, ids=["exit 1", "socket timed out", "garbage", "hangs"])
def test_with_the_queue_away_too_the_next_attempt_finds_it(
    slurm: FakeSlurm, tmp_path: Path, word: dict[str, Any]
) -> None:
    slurm.plan("sbatch", word)
    slurm.plan("squeue", *[{"stderr": "Unable to contact slurm controller", "code": 1}] * 3)
    with pytest.raises(SlurmUnknown):
        provider_of(client_of(slurm, timeout_s=1.0)).submit(order_of(tmp_path))
    restarted = provider_of(client_of(slurm))
    slurm.plan("squeue")
    assert restarted.submit(order_of(tmp_path)) == slurm.jobs[0]["id"]
    assert len(slurm.jobs) == 1


def test_a_lost_submission_that_never_arrived_is_made_by_the_next_attempt(
    slurm: FakeSlurm, provider: SlurmProvider, tmp_path: Path
) -> None:
    slurm.plan("sbatch", {"code": 1})
    with pytest.raises(SlurmUnknown):
        provider.submit(order_of(tmp_path))
    assert provider.submit(order_of(tmp_path)) == slurm.jobs[0]["id"]
    assert len(slurm.jobs) == 1


def test_the_same_order_is_one_job_also_for_another_broker_process(slurm: FakeSlurm, tmp_path: Path) -> None:
    ids = {provider_of(client_of(slurm)).submit(order_of(tmp_path)) for _ in range(5)}
    assert len(ids) == len(slurm.jobs) == 1
    assert slurm.count("sbatch") == 1


def test_a_job_that_slurm_has_forgotten_is_found_in_accounting(
    slurm: FakeSlurm, provider: SlurmProvider, tmp_path: Path
) -> None:
    job_id = provider.submit(order_of(tmp_path))
    slurm.change(job_id, state="COMPLETED", forgotten=True)
    assert provider.submit(order_of(tmp_path)) == job_id
    assert len(slurm.jobs) == 1


def test_a_first_submission_costs_one_call(slurm: FakeSlurm, provider: SlurmProvider, tmp_path: Path) -> None:
    provider.submit(order_of(tmp_path))
    assert [call["tool"] for call in slurm.calls] == ["sbatch"]


def test_the_script_is_kept_for_people_where_only_the_service_reads(provider: SlurmProvider, tmp_path: Path) -> None:
    order = order_of(tmp_path)
    provider.submit(order)
    kept = order.worker_file.with_name("job.sbatch")
    assert kept.read_text().startswith("#!/bin/bash\n")
    assert kept.stat().st_mode & 0o777 == 0o600


def test_a_value_that_may_not_stand_in_a_script_is_refused_before_slurm_is_asked(
    slurm: FakeSlurm, provider: SlurmProvider, tmp_path: Path
) -> None:
    with pytest.raises(SlurmRejected, match="account"):
        provider.submit(order_of(tmp_path, account="a\n#SBATCH --uid=0"))
    assert slurm.calls == []


@pytest.mark.parametrize(
    ("slurm_state", "state"),
    [
        ("PENDING", JobState.PENDING),
        ("CONFIGURING", JobState.PENDING),
        ("REQUEUED", JobState.PENDING),
        ("RUNNING", JobState.RUNNING),
        ("COMPLETING", JobState.RUNNING),
        ("SUSPENDED", JobState.RUNNING),
        ("SOME_STATE_OF_A_LATER_RELEASE", JobState.RUNNING),
        *[
            (ended, JobState.ENDED)
            for ended in (
                *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL"),
                *("OUT_OF_MEMORY", "DEADLINE"),
            )
        ],
    ],
)
def test_states(slurm: FakeSlurm, provider: SlurmProvider, slurm_state: str, state: JobState) -> None:
    slurm.set_jobs([job("7", slurm_state)])
    (report,) = provider.poll()
    assert report.state is state
    assert state is not JobState.ENDED or report.reason == slurm_state


def test_one_poll_is_one_call_and_tells_only_jobs_with_this_clusters_tag(
    slurm: FakeSlurm, provider: SlurmProvider
) -> None:
    slurm.set_jobs(
        [
            job("1", "RUNNING", start="2026-11-20T09:23:12", end="2026-11-20T10:23:12"),
            job("2", "PENDING", "pt-small-2-x", node="", reason="Resources", start="2026-11-20T09:23:12"),
            job("3", "RUNNING", "pt-small-3-x", comment="prompttuner cluster=other pool=small"),
            job("4", "RUNNING", "pt-small-4-x", comment=""),
            job("5", "RUNNING", "somebody", comment=f"{OURS} and more"),
        ]
    )
    running, pending = provider.poll()
    assert (running.job_id, running.node, running.end_unix_s - running.start_unix_s) == ("1", "n1", 3600.0)
    assert (pending.job_id, pending.reason, pending.start_unix_s) == ("2", "Resources", 0.0)
    assert slurm.count("squeue") == len(slurm.calls) == 1


def test_jobs_that_left_the_queue_are_told_as_ended_once_with_accountings_word(
    slurm: FakeSlurm, provider: SlurmProvider
) -> None:
    slurm.set_jobs([job(str(n), "RUNNING", f"pt-small-{n}-x") for n in range(1, 41)])
    assert len(provider.poll()) == 40
    slurm.set_jobs([one | {"state": "NODE_FAIL", "forgotten": True} for one in slurm.jobs])
    ended = provider.poll()
    assert {report.state for report in ended} == {JobState.ENDED}
    assert {report.reason for report in ended} == {"NODE_FAIL"}
    assert slurm.count("sacct") == 1
    assert provider.poll() == []


@pytest.mark.parametrize(
    "word",
    [
        {"stderr": "sacct: error: Problem talking to the database: Connection refused\n", "code": 1},
        {"stderr": "Slurm accounting storage is disabled\n", "code": 1},
        {"stdout": "7|RUNNING|0:0|Unknown|Unknown|n1|pt-small-1-x\n"},
        {"stdout": "\udcff|||\n7|"},
    ],
    ids=["database down", "no accounting", "late database", "garbage"],
)
def test_accounting_never_changes_a_jobs_state(slurm: FakeSlurm, provider: SlurmProvider, word: dict[str, Any]) -> None:
    slurm.set_jobs([job("7", "RUNNING")])
    provider.poll()
    slurm.forget("7")
    slurm.plan("sacct", word)
    (report,) = provider.poll()
    assert (report.state, report.reason) == (JobState.ENDED, "gone from squeue")


def test_without_sacct_nothing_fails(tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path / "slurm", tuple(tool for tool in TOOLS if tool not in ("sacct", "sacctmgr")))
    provider = provider_of(client_of(slurm))
    slurm.set_answers("scontrol", "ClusterName = fake\nAccountingStorageEnforce = associations\n")
    slurm.set_jobs([job("7", "RUNNING")])
    provider.poll()
    slurm.forget("7")
    assert provider.poll()[0].state is JobState.ENDED
    assert provider.accounts() is None


@pytest.mark.parametrize(
    "word",
    [
        {"stderr": "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", "code": 1},
        {"do": True, "cut": 40},
        {"stdout": "lorem ipsum \udcff\n"},
        {"hang_s": 60},
    ],
    ids=["down", "cut", "garbage", "hangs"],
)
def test_a_queue_that_cannot_be_read_ends_no_job(slurm: FakeSlurm, word: dict[str, Any]) -> None:
    provider = provider_of(client_of(slurm, timeout_s=1.0))
    slurm.set_jobs([job("7", "RUNNING"), job("8", "RUNNING", "pt-small-2-x")])
    provider.poll()
    slurm.plan("squeue", *[word] * 3)
    with pytest.raises(SlurmUnavailable):
        provider.poll()
    slurm.plan("squeue")
    assert {report.state for report in provider.poll()} == {JobState.RUNNING}


def test_a_requeued_job_is_pending_again(slurm: FakeSlurm, provider: SlurmProvider) -> None:
    slurm.set_jobs([job("7", "RUNNING")])
    provider.poll()
    slurm.change("7", state="PENDING", node="", reason="BeginTime")
    (report,) = provider.poll()
    assert (report.job_id, report.state, report.reason) == ("7", JobState.PENDING, "BeginTime")


def test_a_second_live_job_of_a_name_is_cancelled_and_the_first_is_told(
    slurm: FakeSlurm, provider: SlurmProvider
) -> None:
    slurm.set_jobs([job("9", "PENDING"), job("7", "RUNNING"), job("5", "FAILED")])
    (report,) = provider.poll()
    assert (report.job_id, report.state) == ("7", JobState.RUNNING)
    assert {one["id"]: one["state"] for one in slurm.jobs} == {"9": "CANCELLED", "7": "RUNNING", "5": "FAILED"}


def test_only_slurm_ids_can_be_cancelled(slurm: FakeSlurm, provider: SlurmProvider) -> None:
    for hostile in ("--user=root", "-u root", "1 2", "", "7;x", "\n7"):
        with pytest.raises(SlurmRejected):
            provider.cancel(["7", hostile])
    provider.cancel([])
    assert slurm.calls == []


def test_accounts_of_users_with_their_defaults(slurm: FakeSlurm, provider: SlurmProvider) -> None:
    slurm.set_answers("scontrol", "ClusterName = fake\nAccountingStorageEnforce = associations,limits,qos\n")
    slurm.set_answers("sacctmgr", "alice|teamb|teama|fake\nalice|teamb|teamb|fake\nbob|teamb|teamb|fake\n")
    accounts = provider.accounts()
    assert accounts is not None
    assert accounts["alice"].default == "teamb"
    assert accounts["alice"].allowed == {"teama", "teamb"}
    assert accounts["bob"].allowed == {"teamb"}


def test_accounts_are_none_where_slurm_enforces_none(slurm: FakeSlurm, provider: SlurmProvider) -> None:
    slurm.set_answers("scontrol", "ClusterName = fake\nAccountingStorageEnforce = none\n")
    assert provider.accounts() is None
    assert slurm.count("sacctmgr") == 0

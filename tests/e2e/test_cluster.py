"""The test cluster keeps its promises: what the other end-to-end tests take for granted of Slurm is true of it."""

from __future__ import annotations

import os
import pwd
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, ClusterError, MissingPackages
from tests.cluster.config import PORT_NAMES
from tests.cluster.packages import ensure_installed
from tests.cluster.process import Process, marked, read_pid, wait_until, write_pid
from tests.cluster.setup import new_layout, remove

PROJECT = Path(__file__).resolve().parents[2]
SYSTEM_PYTHON = "/usr/bin/python3"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="several Unix users need root")


@pytest.fixture
def jobs(cluster: Cluster) -> Iterator[list[str]]:
    """Ids of jobs that a test submits, cancelled at its end."""
    ids: list[str] = []
    yield ids
    if ids:
        cluster.run("scancel", *ids, check=False)


def submit(cluster: Cluster, user: str, script: str, *options: str) -> str:
    return cluster.run(
        "sbatch", "--parsable", "--output=/dev/null", *options, user=user, input=f"#!/bin/bash\n{script}\n"
    ).stdout.strip()


def state(cluster: Cluster, job: str) -> str:
    return cluster.run("squeue", "-h", "-j", job, "-o", "%T", check=False).stdout.strip()


def accounted(cluster: Cluster, job: str, fields: str, *options: str) -> list[list[str]]:
    rows = cluster.run("sacct", "-nP", "-j", job, f"--format={fields}", *options).stdout.splitlines()
    return [row.split("|") for row in rows]


def test_four_nodes_with_two_gpus_each_are_up(cluster: Cluster) -> None:
    rows = cluster.run("sinfo", "-h", "-N", "-p", "normal", "-o", "%N %c %G %T").stdout.splitlines()
    assert [row.split()[:3] for row in rows] == [[f"node{n}", "16", "gpu:h100:2"] for n in (1, 2, 3, 4)]
    assert {row.split()[3] for row in rows} <= {"idle", "mixed", "allocated"}


def test_both_partitions_are_there_and_normal_is_the_default(cluster: Cluster) -> None:
    assert cluster.run("sinfo", "-h", "-s", "-o", "%P").stdout.split() == ["normal*", "preemptible"]


@needs_root
def test_a_users_job_sees_its_gpu_and_is_accounted_with_it(cluster: Cluster) -> None:
    output = cluster.run(
        "srun", "--gres=gpu:1", "-J", "look", "printenv", "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES", user="alice"
    ).stdout
    job, gpu = output.split()
    assert gpu in ("0", "1")
    # slurmctld hands new jobs to slurmdbd every five seconds.
    fields = "User,Account,State,AllocTRES"
    wait_until(
        lambda: any(row[2] == "COMPLETED" for row in accounted(cluster, job, fields, "-X")), 30, "the job in sacct"
    )
    [(user, account, _, tres)] = accounted(cluster, job, fields, "-X")
    assert (user, account) == ("alice", "teama")
    assert "gres/gpu=1" in tres.split(",")


@needs_root
def test_an_account_is_closed_to_who_is_not_in_it(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="Invalid account"):
        cluster.run("srun", "--account=teamb", "true", user="alice")


@needs_root
def test_the_service_user_may_cancel_others_jobs_and_others_may_not(cluster: Cluster, jobs: list[str]) -> None:
    jobs.append(job := submit(cluster, "alice", "sleep 600"))
    with pytest.raises(ClusterError, match="Access/permission denied"):
        cluster.run("scancel", job, user="bob")
    cluster.run("scancel", job, user="prompttuner")
    wait_until(lambda: state(cluster, job) in ("", "CANCELLED"), 30, "the job to be cancelled")


@needs_root
def test_homes_are_closed_to_others(cluster: Cluster) -> None:
    assert cluster.home("alice").stat().st_mode & 0o077 == 0
    assert cluster.run("ls", cluster.home("alice"), user="bob", check=False).returncode != 0


@needs_root
def test_a_preempted_step_gets_term_when_its_grace_begins(cluster: Cluster, jobs: list[str]) -> None:
    started, terminated = cluster.home("bob") / "started", cluster.home("bob") / "terminated"
    for file in (started, terminated):
        file.unlink(missing_ok=True)
    step = f"trap 'touch {terminated}; exit' TERM; touch {started}; while :; do sleep 0.1; done"
    where = ("--nodelist=node4", "--gres=gpu:2")
    jobs.append(
        victim := submit(cluster, "bob", f'srun bash -c "{step}"\nsleep 600', "--partition=preemptible", *where)
    )
    wait_until(started.exists, 30, "bob's step to start")
    jobs.append(submit(cluster, "alice", "sleep 600", *where))
    wait_until(terminated.exists, 30, "SIGTERM in bob's step")
    assert state(cluster, victim) == "RUNNING"  # its batch script has the rest of the grace


@needs_root
def test_an_overlapping_step_shows_by_name_in_accounting(cluster: Cluster, jobs: list[str]) -> None:
    jobs.append(job := submit(cluster, "prompttuner", "sleep 600", "--gres=gpu:1"))
    wait_until(lambda: state(cluster, job) == "RUNNING", 30, "the job to run")
    cluster.run(
        "srun",
        f"--jobid={job}",
        "--overlap",
        "--gres=none",
        "--mem=0",
        "-n1",
        "-c1",
        "--job-name=req-42-alice",
        "true",
        user="prompttuner",
    )

    def named() -> bool:
        return ["req-42-alice", "COMPLETED"] in accounted(cluster, job, "JobName%40,State")

    wait_until(named, 30, "the step in sacct")


@needs_root
def test_munge_says_who_made_a_credential(cluster: Cluster) -> None:
    credential = cluster.run("munge", "-S", cluster.munge_socket, "-s", "hello", user="alice").stdout
    decoded = cluster.run("unmunge", "-S", cluster.munge_socket, input=credential, user="prompttuner").stdout
    assert re.search(rf"^UID:\s+alice \({pwd.getpwnam('alice').pw_uid}\)$", decoded, re.MULTILINE)
    assert decoded.rstrip().endswith("hello")


@needs_root
def test_a_job_outlives_the_death_of_its_controller(cluster: Cluster, jobs: list[str]) -> None:
    started, finish = cluster.home("alice") / "started", cluster.home("alice") / "finish"
    for file in (started, finish):
        file.unlink(missing_ok=True)
    script = f"touch {started}; until [ -e {finish} ]; do sleep 0.1; done; exit 7"
    jobs.append(job := submit(cluster, "alice", script))
    wait_until(started.exists, 30, "the job to run")
    # What slurmctld has not saved yet, it forgets; it saves after each change, so this change brings the start along.
    saved = cluster.dir / "state/job_state"
    before_ns = saved.stat().st_mtime_ns if saved.exists() else 0
    cluster.run("scontrol", "update", f"JobId={job}", "Comment=save", user="alice")
    wait_until(lambda: saved.exists() and saved.stat().st_mtime_ns > before_ns, 30, "the jobs to be saved")
    cluster.kill("slurmctld", signal.SIGKILL)
    assert cluster.status()["slurmctld"] is None
    cluster.start("slurmctld")
    cluster.wait_nodes()
    assert state(cluster, job) == "RUNNING"
    finish.touch()
    wait_until(
        lambda: ["FAILED", "7:0"] in accounted(cluster, job, "State,ExitCode", "-X"), 60, "the job's end in sacct"
    )


@pytest.mark.parametrize("daemon", ["munged", "mariadbd", "slurmdbd", "slurmd@node3"])
def test_each_daemon_can_be_killed_and_started_again(cluster: Cluster, daemon: str) -> None:
    cluster.kill(daemon)
    assert cluster.status()[daemon] is None
    with pytest.raises(ClusterError, match="does not run"):
        cluster.kill(daemon)
    cluster.start(daemon)
    cluster.wait_nodes()
    assert cluster.run("srun", "--nodelist=node3", "echo", "works").stdout == "works\n"
    wait_until(lambda: cluster.run("sacct", "-nX", check=False).returncode == 0, 30, "sacct to answer")


def test_up_leaves_a_cluster_that_is_up_as_it_is(cluster: Cluster) -> None:
    before = cluster.status()
    assert Cluster.up(cluster.dir).status() == before == Cluster.attach(cluster.dir).status()


def test_commands_see_no_other_cluster_than_this(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    lines = cluster.run("env").stdout.splitlines()
    assert [line for line in lines if line.startswith(("SLURM_", "SBATCH_"))] == [f"SLURM_CONF={cluster.slurm_conf}"]


@needs_root
def test_an_ordinary_user_has_a_whole_cluster_too_and_down_leaves_nothing(cluster: Cluster) -> None:
    own = Path(f"/var/tmp/prompttuner-test-rootless-{os.getpid():x}")

    def tool(command: str) -> subprocess.CompletedProcess[str]:
        return cluster.run(
            SYSTEM_PYTHON,
            PROJECT / "tests/cluster",
            command,
            "--dir",
            own,
            "--rootless",
            user="alice",
            timeout=200,
            cwd="/",
        )

    def as_alice(*argv: str) -> str:
        return cluster.run(*argv, user="alice", env={"SLURM_CONF": str(own / "etc/slurm.conf")}).stdout

    def left() -> list[Process]:
        return list(marked([f"PROMPTTUNER_CLUSTER_DIR={own}".encode(), f"SLURM_CLUSTER_NAME={name}".encode()]))

    try:
        assert f"export SLURM_CONF={own}/etc/slurm.conf" in tool("up").stdout
        assert "already up" in tool("up").stdout
        variables = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES")
        name, job, gpu = as_alice("srun", "--gres=gpu:1", "printenv", *variables).split()
        assert gpu in ("0", "1")
        started = own / "started"
        as_alice("sbatch", "--output=/dev/null", f"--wrap=setsid sleep 600 & touch {started}; wait")
        wait_until(
            lambda: "alice|teama|COMPLETED" in as_alice("sacct", "-nPX", "-j", job, "-o", "User,Account,State"),
            30,
            "the job in sacct",
        )
        wait_until(started.exists, 30, "the batch job to run")
        for daemon in ("slurmd@node1", "slurmctld"):
            killed = read_pid(own / "pids" / daemon)
            assert killed is not None
            killed.signal(signal.SIGKILL)
        programs = {Path(f"/proc/{process.pid}/comm").read_text().strip() for process in left()}
        assert programs >= {"munged", "mariadbd", "slurmdbd", "slurmd", "slurmstepd", "sleep"}
    finally:
        tool("down")
    assert not own.exists()
    assert left() == []


@needs_root
def test_up_refuses_a_directory_that_the_users_could_not_enter_and_makes_nothing() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as closed:
        with pytest.raises(ClusterError, match="may not be entered by others"):
            Cluster.up(Path(closed) / "cluster")
        assert not any(Path(closed).iterdir())


def test_two_clusters_share_no_name_and_each_port_serves_one_daemon() -> None:
    first, second = (new_layout(Path(f"/var/tmp/{name}"), rootless=os.geteuid() != 0) for name in ("a", "b"))
    assert first.name != second.name
    assert len(set(first.ports.values())) == len(PORT_NAMES)


def test_up_and_down_leave_a_directory_alone_that_is_no_clusters() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        precious = Path(folder) / "thesis.tex"
        precious.write_text("years of work")
        Path(folder).chmod(0o755)
        with pytest.raises(ClusterError, match="holds no cluster"):
            Cluster.up(folder)
        with pytest.raises(ClusterError, match="no cluster in"):
            Cluster.attach(folder)
        with pytest.raises(ClusterError, match="left alone"):
            remove(Path(folder))
        assert list(Path(folder).iterdir()) == [precious]


def test_a_pid_that_now_belongs_to_another_program_is_never_signalled(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as bystander:
        try:
            write_pid(tmp_path / "slurmctld", Process(bystander.pid, start_ticks=1))
            stale = read_pid(tmp_path / "slurmctld")
            assert stale is not None and not stale.alive()
            stale.signal(signal.SIGKILL)
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.cluster.packages.SEARCH_PATH", "/nowhere")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(
        MissingPackages, match=r"mariadb-server munge .*slurmctld slurmd slurmdbd; as root, run: apt-get"
    ):
        ensure_installed()

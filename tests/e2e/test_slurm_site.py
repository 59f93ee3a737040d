"""An installed site keeps its promises on a real Slurm cluster: ordinary users, a service user, warm jobs with GPUs."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from broker.net.munge import Munge, digest_of
from broker.protocol.errors import error_for
from broker.protocol.messages import Cancel, ErrorReply, Info, InfoReply, client_reply_decoder, pack, unpack
from tests.cluster import Cluster
from tests.cluster.packages import program
from tests.processes import alive, kill, until
from tests.site import Site
from tests.stock_peft import loss_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="several Unix users need root")

TASK = "copy-cities-plain"
OTHERS = ("copy-names-end_a", "odds-fruits-plain")
STEPS = 500
LONG = (f"--max-steps={STEPS}", "--prompt-tokens=8", "--init=random", "--partition=normal")
CAP = 3


@pytest.fixture(scope="module")
def site(cluster: Cluster) -> Iterator[Site]:
    """A pool that may grow from one worker to three, and another one that may be preempted."""
    site = Site(
        cluster,
        {"slots": 4, "max_workers": CAP, "idle_window": "8s"},
        more_pools={
            "spare": {
                "partition": "preemptible",
                "gres": "gpu:h100:2",
                "gpus_per_worker": 2,
                "min_workers": 0,
                "max_workers": 2,
                "idle_window": "5s",
            }
        },
        slurm=['poll = "2s"', "calls_per_s = 5.0"],
    )
    shutil.rmtree(results(cluster), ignore_errors=True)
    results(cluster).mkdir()
    shutil.chown(results(cluster), "alice", "alice")
    try:
        site.start_broker()
        until(site.warm, 90, lambda: f"a warm worker; broker log: {site.log()}")
        yield site
    finally:
        site.down()
        shutil.rmtree(results(cluster))


def results(cluster: Cluster) -> Path:
    """Where alice keeps what she fetches: in her home, which she alone may enter."""
    return cluster.home("alice") / "prompttuner-tests"


@pytest.fixture(scope="module")
def first(site: Site) -> tuple[int, Path, str]:
    """The first request of alice, from a file that she alone may read: its id, folder and what ptbatch said."""
    assert site.cluster.home("alice").stat().st_mode & 0o077 == 0
    home = results(site.cluster)
    for part in ("train", "eval"):
        shutil.copy(site.task(TASK, part), home / f"{part}.jsonl")
        shutil.chown(home / f"{part}.jsonl", "alice", "alice")
        os.chmod(home / f"{part}.jsonl", 0o600)
    words = ("--model=tiny", "--train=train.jsonl", "--eval=eval.jsonl", "--prompt-tokens=8", "--target-score=0.1")
    done = site.run("ptbatch", *words, "--slo=2m", "--wait", "--output=tuned", user="alice", cwd=home)
    return int(done.stdout.split()[-1]), home / "tuned", done.stderr


@pytest.fixture(scope="module")
def of_bob(site: Site) -> int:
    """A request of bob's that has ended."""
    request_id = site.submit(TASK, "--max-steps=20", user="bob")
    assert site.wait([request_id], "bob")[0]["state"] == "COMPLETED"
    return request_id


def accounted(site: Site, *options: str) -> list[list[str]]:
    return [row.split("|") for row in site.cluster.run("sacct", "-nP", "-a", *options).stdout.splitlines()]


# --- the way of a request -------------------------------------------------------------------------------------------


def test_an_ordinary_user_gets_a_tuned_prompt_that_stock_peft_loads_with_the_reported_loss(
    site: Site, first: tuple[int, Path, str]
) -> None:
    request_id, folder, said = first
    assert "RUNNING step" in said and "COMPLETED" in said and "deadline met" in said
    alice = pwd.getpwnam("alice").pw_uid
    assert {path.stat().st_uid for path in (folder, *folder.iterdir())} == {alice}
    measured = loss_of(site.dir / "tiny", folder, site.task(TASK, "eval"))
    report = json.loads((folder / "prompttuner.json").read_text())
    assert measured == pytest.approx(report["best"]["loss"], abs=1e-3)
    assert site.row(request_id, "alice")["loss"] == pytest.approx(measured, abs=1e-3)


def test_accounting_shows_the_warm_job_with_its_gpu_under_the_service_user(
    site: Site, first: tuple[int, Path, str]
) -> None:
    job = site.row(first[0], "alice")["job_id"]

    def shown() -> list[str]:  # slurmdbd hears of a start some seconds later
        rows = accounted(site, "-X", "-j", job, "-o", "User,Account,State,AllocTRES,Comment")
        return rows[0] if rows and rows[0][2] != "PENDING" else []

    user, account, state, tres, _ = until(shown, 30, "the warm job in sacct")
    assert (user, account, state) == ("prompttuner", "svc", "RUNNING")
    assert "gres/gpu=1" in tres.split(",")


def test_accounting_shows_one_completed_step_for_each_request(
    site: Site, first: tuple[int, Path, str], of_bob: int
) -> None:
    job = site.row(first[0], "alice")["job_id"]
    assert site.row(of_bob, "bob")["job_id"] == job
    wanted = sorted([f"req-{first[0]}.alice", f"req-{of_bob}.bob"])

    def steps() -> list[tuple[str, str]]:
        rows = accounted(site, "-j", job, "-o", "JobName%60,State")
        found = sorted((name, state) for name, state in rows if name in wanted)
        return found if found == [(name, "COMPLETED") for name in wanted] else []

    until(steps, 30, lambda: f"one step for each request: {accounted(site, '-j', job, '-o', 'JobName%60,State')}")


def test_ptacct_tells_the_user_of_gpu_seconds_and_the_deadline(site: Site, first: tuple[int, Path, str]) -> None:
    fields = "ReqID,User,Account,GPUSec,Deadline,Met,StepID"
    line = site.run("ptacct", "-nP", "-j", str(first[0]), "-o", fields, user="alice").stdout.strip()
    request_id, user, account, gpu_s, deadline, met, step_id = line.split("|")
    assert (request_id, user, account, met) == (str(first[0]), "alice", "teama", "yes")
    assert float(gpu_s) > 0 and deadline.startswith("20") and step_id


def test_a_user_finds_no_trace_of_anothers_request(site: Site, first: tuple[int, Path, str], of_bob: int) -> None:
    def answer(command: str, *words: str, number: int) -> str:
        text = site.refused(6, command, *words, str(number), user="bob")
        return re.sub(rf"\b{number}\b", "N", text)

    theirs, unknown = first[0], 999_999
    for command, *words in (["ptfetch"], ["ptattach"], ["ptcancel"], ["ptacct", "-j"], ["ptqueue", "-j"]):
        assert answer(command, *words, number=theirs) == answer(command, *words, number=unknown)
    listed = [row["id"] for row in site.json("ptacct", "-a", user="bob")["requests"]]
    assert of_bob in listed and theirs not in listed
    assert [row["user"] for row in site.json("ptacct", "-a", user="alice")["requests"]].count("bob") == 0
    everyone = {row["user"] for row in site.json("ptacct", "-a", user="root")["requests"]}
    assert everyone >= {"alice", "bob"}


def test_another_user_cannot_touch_a_running_request(site: Site) -> None:
    request_id = site.submit(TASK, *LONG, "--max-steps=1000000", user="alice")
    assert site.json("ptqueue", user="bob")["requests"] == []
    site.refused(6, "ptcancel", str(request_id), user="bob")
    site.run("ptcancel", f"--name={site.row(request_id, 'alice')['job_name']}", user="bob")
    assert site.row(request_id, "alice")["state"] in ("PENDING", "RUNNING")
    site.refused(4, "ptctl", "broker", "stop", user="bob")
    site.run("ptcancel", str(request_id), user="alice")
    assert site.wait([request_id], "alice")[0]["state"] == "CANCELLED"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--account=teamb"], "your accounts: teama"),
        (["--partition=nowhere"], "normal, preemptible"),
        (["--model=tinny"], "did you mean tiny?"),
        (["--qos=gold"], "QOS"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(site: Site, options: list[str], said: str) -> None:
    before = site.json("ptqueue", user="root")["requests"]
    files = [f"--train={site.task(TASK)}"] + ([] if "model" in options[0] else ["--model=tiny"])
    assert said in site.refused(4, "ptbatch", *files, *options, user="alice")
    assert site.json("ptqueue", user="root")["requests"] == before


def test_a_user_without_an_account_is_refused(site: Site) -> None:
    files = ("--model=tiny", f"--train={site.task(TASK)}")
    assert "daemon has no account" in site.refused(4, "ptbatch", *files, user="daemon")


def test_ptctl_finds_nothing_wrong_with_the_site_file(site: Site) -> None:
    site.run("ptctl", "check", site.site_file, user="prompttuner")
    assert "tuner.worker" in site.run("ptctl", "render", "tiny", user="prompttuner").stdout


# --- identity and secrets -------------------------------------------------------------------------------------------


def test_a_missing_forged_foreign_used_or_expired_credential_is_refused(site: Site) -> None:
    munge = Munge(str(site.cluster.munge_socket))
    body = pack(Info())[1]
    genuine = munge.encode(digest_of(body, site.public_key))
    for_other_message = munge.encode(digest_of(pack(Cancel(mine=True))[1], site.public_key))
    for_other_server = munge.encode(digest_of(body, "0" * 40))
    payload, made = site.dir / "payload", time.time()
    payload.write_bytes(digest_of(body, site.public_key))
    words = ("--socket", site.cluster.munge_socket, "--ttl=1", f"--input={payload}")
    expired = site.cluster.run("munge", *words).stdout.strip().encode()
    assert isinstance(say(site, body, genuine), InfoReply)
    until(lambda: time.time() > made + 3, 10, "a credential of one second to be too old")
    for credential in (b"", b"MUNGE:AwQDAAC:", genuine, for_other_message, for_other_server, expired):
        reply = say(site, body, credential)
        assert isinstance(reply, ErrorReply) and error_for(reply.code, "").exit_code == 5, reply


def say(site: Site, body: bytes, credential: bytes) -> object:
    """What the broker answers to these frames."""
    public, secret = zmq.curve_keypair()
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    with dealer:
        dealer.linger = 0
        dealer.curve_publickey, dealer.curve_secretkey = public, secret
        dealer.curve_serverkey = site.public_key.encode()
        dealer.connect(site.address)
        dealer.send_multipart([b"PT1", body, credential])
        assert dealer.poll(10_000), "no answer"
        return unpack(dealer.recv_multipart(), client_reply_decoder)


def test_a_credential_of_another_munge_key_ends_a_command_with_5(site: Site) -> None:
    own = site.dir / "forger"
    own.mkdir(mode=0o755)
    (own / "key").write_bytes(os.urandom(128))
    for path in (own, own / "key"):
        shutil.chown(path, "bob", "bob")
    os.chmod(own / "key", 0o600)
    files = [
        f"--{word}={own / word.partition('-')[0]}"
        for word in ("key-file", "socket", "pid-file", "log-file", "seed-file")
    ]
    munged = site.cluster.popen(program("munged"), "--foreground", "--force", *files, user="bob")
    try:
        until((own / "socket").exists, 20, "the forger's munged")
        text = site.site_file.read_text().replace(str(site.cluster.munge_socket), str(own / "socket"))
        (own / "site.toml").write_text(text)
        site.refused(5, "ptqueue", user="bob", env={"PROMPTTUNER_CONF_DIR": str(own)})
    finally:
        munged.kill()
        munged.wait()


def test_no_secret_leaves_the_private_folder(site: Site) -> None:
    private = [site.private, *site.private.rglob("*")]
    assert [str(path) for path in private if not path.is_symlink() and path.lstat().st_mode & 0o077] == []
    [worker, *_] = site.warm()
    config = json.loads((site.private / "spool/allocations" / worker["name"] / "worker.json").read_text())
    job = worker["job_id"]
    shown = [
        site.cluster.run("scontrol", "show", "job", "-dd", job).stdout,
        site.cluster.run("scontrol", "write", "batch_script", job, "-").stdout,
        site.cluster.run("sacct", "-j", job, "--batch-script").stdout,
        site.cluster.run("sacct", "-j", job, "--env-vars").stdout,
        subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout,
    ]
    assert worker["name"] in shown[0] and "tuner.worker" in shown[1]
    secrets = [config["key"], (site.private / "curve.secret").read_text().strip()]
    secrets.append((site.private / "state/secret").read_text().strip())
    assert [text for text in shown for secret in secrets if secret in text] == []


# --- growing and shrinking ------------------------------------------------------------------------------------------


def test_a_burst_orders_more_workers_never_beyond_the_cap_and_gives_them_back(site: Site) -> None:
    ids = [
        site.submit(task, "--max-steps=300", "--init=random", "--partition=normal", "--slo=20s", user="alice")
        for task in (TASK, *OTHERS)
        for _ in range(4)
    ]
    counts: list[int] = []

    def all_ended() -> bool:
        counts.append(sum(state in ("PENDING", "RUNNING") for state in site.jobs().values()))
        return not site.json("ptqueue", user="alice")["requests"]

    until(all_ended, 150, lambda: f"the burst ends; broker log: {site.log()}")
    assert [row["state"] for row in site.wait(ids, "alice")] == ["COMPLETED"] * len(ids)
    assert 1 < max(counts) <= CAP
    until(lambda: len(site.jobs()) == 1 and len(site.warm()) == 1, 60, lambda: f"back to the floor: {site.jobs()}")


# --- what breaks ----------------------------------------------------------------------------------------------------


def long_ones(site: Site, count: int = 4) -> list[int]:
    tasks = (TASK, *OTHERS, TASK)[:count]
    ids = [site.submit(task, *LONG, user="alice") for task in tasks]
    until(lambda: all(site.row(i, "alice")["step"] > 20 for i in ids), 90, "all of them train")
    return ids


def ended_once(site: Site, ids: list[int]) -> list[int]:
    """Each completed with a result; their attempts."""
    rows = site.wait(ids, "alice")
    assert [(row["state"], row["step"]) for row in rows] == [("COMPLETED", STEPS)] * len(ids)
    folder = results(site.cluster) / str(ids[0])
    site.run("ptfetch", str(ids[0]), "-o", folder, user="alice")
    assert json.loads((folder / "prompttuner.json").read_text())["request_id"] == ids[0]
    return [row["attempts"] for row in rows]


def test_a_killed_broker_comes_back_to_its_warm_jobs_and_every_request_ends_once(site: Site) -> None:
    ids = long_ones(site)
    jobs, workers = site.jobs(), site.supervisors()
    site.kill_broker()
    site.refused(3, "ptqueue", user="alice")
    site.start_broker()
    until(site.warm, 30, lambda: f"the worker is back; broker log: {site.log()}")
    assert ended_once(site, ids) == [1] * len(ids)
    assert workers.items() <= site.supervisors().items() and jobs.keys() <= site.jobs().keys()


def test_requests_of_a_cancelled_job_go_on_elsewhere(site: Site) -> None:
    ids = long_ones(site)
    job = site.row(ids[0], "alice")["job_id"]
    site.cluster.run("scancel", job)
    assert all(attempts >= 2 for attempts in ended_once(site, ids))
    assert job not in [site.row(i, "alice")["job_id"] for i in ids]


def test_requests_of_a_killed_worker_go_on_elsewhere(site: Site) -> None:
    ids = long_ones(site)
    allocation = site.row(ids[0], "alice")["allocation"]
    [pid] = [pid for pid, name in site.supervisors().items() if name == allocation]
    kill(pid)
    assert all(attempts >= 2 for attempts in ended_once(site, ids))
    assert allocation not in [site.row(i, "alice")["allocation"] for i in ids]
    until(lambda: allocation not in site.supervisors().values(), 30, "nothing is left of it")


def test_requests_of_a_preempted_job_go_on_elsewhere(site: Site) -> None:
    steps = 2 * STEPS  # alone on its worker, and Slurm takes its time
    words = (f"--max-steps={steps}", "--prompt-tokens=8", "--init=random", "--partition=preemptible")
    request_id = site.submit(TASK, *words, user="alice")
    until(lambda: site.row(request_id, "alice")["step"] > 20, 90, lambda: f"it trains; {site.log()}")
    before = site.row(request_id, "alice")
    script = "#!/bin/bash\nsleep 300\n"
    where = (f"--nodelist={before['nodes']}", "--partition=normal", "--gres=gpu:2", "--output=/dev/null")
    mine = site.cluster.run("sbatch", "--parsable", *where, user="alice", input=script).stdout.strip()
    try:
        [row] = site.wait([request_id], "alice")
        assert (row["state"], row["step"]) == ("COMPLETED", steps)
        assert row["attempts"] == 2 and row["job_id"] != before["job_id"] and row["nodes"] != before["nodes"]
        until(lambda: mine in site.cluster.run("squeue", "-h", "-t", "R", "-o", "%A").stdout, 60, "her job runs")
    finally:
        site.cluster.run("scancel", mine)
    until(lambda: site.jobs("spare") == {}, 60, "the preemptible pool, without a floor, empties")


def test_a_stray_job_with_our_tag_is_cancelled_and_others_are_left_alone(site: Site) -> None:
    [warm, *_] = site.warm()
    tag = warm["name"].rpartition("-")[2]
    comment = site.cluster.run("squeue", "-h", "-j", warm["job_id"], "-o", "%k").stdout.strip()
    common = ("--parsable", "--output=/dev/null", "--partition=normal", "--account=svc", f"--comment={comment}")
    script = "#!/bin/bash\nsleep 300\n"
    stray, foreign = (
        site.cluster.run("sbatch", *common, f"--job-name={name}", user="prompttuner", input=script).stdout.strip()
        for name in (f"pt-tiny-999-{tag}", "pt-tiny-999-00000000")
    )
    try:
        until(lambda: stray not in running(site), 30, "the stray job is cancelled")
        assert foreign in running(site) and warm["job_id"] in running(site)
    finally:
        site.cluster.run("scancel", foreign)


def running(site: Site) -> list[str]:
    return site.cluster.run("squeue", "-h", "-t", "PD,R", "-o", "%A").stdout.split()


@pytest.mark.parametrize("submitted", [True, False], ids=["after", "before"])
def test_a_broker_killed_within_an_order_has_exactly_one_job_for_it(cluster: Cluster, submitted: bool) -> None:
    """The first sbatch hangs, after or before it submitted; the broker dies then, and never hears the job's id."""
    tools = cluster.dir / "tools"
    shutil.rmtree(tools, ignore_errors=True)
    tools.mkdir()
    shutil.chown(tools, "prompttuner")  # whose sbatch leaves marks there
    for name in ("squeue", "scancel", "scontrol", "sacct", "sacctmgr", "srun"):
        (tools / name).symlink_to(program(name))
    real, once, hung = program("sbatch"), tools / "once", tools / "hung"
    first_call = f'{real} "$@" >/dev/null; ' if submitted else ""
    hangs = f"if mkdir {once} 2>/dev/null; then {first_call}touch {hung}; exec sleep 20; fi"
    (tools / "sbatch").write_text(f'#!/bin/sh\n{hangs}\nexec {real} "$@"\n')
    (tools / "sbatch").chmod(0o755)
    site = Site(cluster, name="crash", slurm=[f'bin_dir = "{tools}"', 'poll = "2s"'])
    try:
        site.start_broker()
        until(hung.exists, 30, "the first sbatch hangs")
        [ordered] = site.allocations()
        assert ordered["state"] == "ordered" and ordered["job_id"] == ""
        site.kill_broker()
        site.start_broker()
        until(site.warm, 60, lambda: f"the allocation is warm; broker log: {site.log()}")
        [warm] = site.allocations()
        assert warm["name"] == ordered["name"]
        jobs = cluster.run("squeue", "-h", "-t", "all", "-n", warm["name"], "-o", "%A").stdout.split()
        assert jobs == [warm["job_id"]]
    finally:
        site.down()


# --- one user's own broker ------------------------------------------------------------------------------------------


def test_an_ordinary_user_has_a_broker_of_her_own_whose_workers_are_her_jobs(cluster: Cluster) -> None:
    site = Site(cluster, name="personal", personal="alice")
    try:
        site.start_broker()
        until(site.warm, 90, lambda: f"a warm worker; broker log: {site.log()}")
        folder = site.private / "result"
        words = ("--model=tiny", f"--train={site.task(TASK)}", "--max-steps=20", "--wait", f"--output={folder}")
        done = site.run("ptbatch", *words, user="alice")
        row = site.row(int(done.stdout.split()[-1]), "alice")
        assert row["state"] == "COMPLETED" and (folder / "adapter_model.safetensors").exists()
        owner = cluster.run("squeue", "-h", "-j", row["job_id"], "-o", "%u %a").stdout.split()
        assert owner == ["alice", "teama"]
        assert "Permission denied" in site.refused(1, "ptqueue", user="bob")
    finally:
        site.down()
    until(lambda: not site.supervisors(), 60, "her workers have ended")


def test_stop_ends_every_warm_job(site: Site) -> None:
    pids = list(site.supervisors())
    assert pids
    site.run("ptctl", "broker", "stop", user="prompttuner")
    until(lambda: site.jobs() == {} and not any(map(alive, pids)), 60, lambda: f"no job is left: {site.jobs()}")
    site.refused(3, "ptinfo", user="alice")

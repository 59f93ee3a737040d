"""The worker's processes against a broker's socket, with a session that sleeps instead of training."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import zmq

from broker.protocol.config import WorkerConfig
from broker.protocol.messages import (
    Assign,
    Drain,
    Ended,
    EndedAck,
    FromWorker,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Leaving,
    Message,
    Progress,
    Ready,
    Register,
    Registered,
    Reregister,
    Running,
    Stop,
    from_worker_decoder,
    pack,
    unpack,
)
from broker.protocol.spec import RequestSpec
from broker.protocol.states import RequestState

PROCESSES = Path(__file__).with_name("processes")
LIMIT_S = 60.0
LONG = 1_000_000

M = TypeVar("M", bound=Message)


class FakeBroker:
    """A ROUTER that records what one worker says, and answers registrations and heartbeats."""

    def __init__(self, address: str, secret_key: bytes | None = None) -> None:
        self._context = zmq.Context()
        self._secret_key = secret_key
        self.address = address
        self.key = "right"
        self.epoch = 1
        self.drop: list[Running] = []
        self.acknowledge = True
        self.mute = False
        self.said: list[FromWorker] = []
        self.peer = b""
        self.open()

    def open(self) -> None:
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.linger = 0
        if self._secret_key:
            self.socket.curve_server = True
            self.socket.curve_secretkey = self._secret_key
        deadline = time.monotonic() + LIMIT_S
        while True:  # the one before closes in the background
            try:
                self.socket.bind(self.address)
                break
            except zmq.ZMQError:
                assert time.monotonic() < deadline, f"{self.address} stays taken"
                time.sleep(0.01)
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def close(self) -> None:
        self.socket.close()

    def end(self) -> None:
        self.socket.close()
        self._context.term()

    def send(self, message: Message) -> None:
        self.socket.send_multipart([self.peer, *pack(message)])

    def hear(self, wait_s: float) -> None:
        if not self.socket.poll(int(wait_s * 1000)):
            return
        self.peer, *frames = self.socket.recv_multipart()
        message = unpack(frames, from_worker_decoder)
        self.said.append(message)
        if self.mute:
            return
        if isinstance(message, Register):
            right = message.key == self.key
            self.send(Registered(epoch=self.epoch, drop=self.drop) if right else Goodbye(reason="wrong key"))
        elif isinstance(message, Heartbeat):
            self.send(HeartbeatAck(epoch=message.epoch))
        elif isinstance(message, Ended) and self.acknowledge:
            self.send(EndedAck(request_id=message.request_id, attempt=message.attempt))

    def await_(self, kind: type[M], such: Callable[[M], bool] = lambda message: True) -> M:
        """The first message of `kind` that is `such`; removes it and everything before it."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            for place, message in enumerate(self.said):
                if isinstance(message, kind) and such(message):
                    del self.said[: place + 1]
                    return message
            assert time.monotonic() < deadline, f"no such {kind.__name__} among {self.said[-5:]}"
            self.hear(0.05)

    def await_silence(self, worker: subprocess.Popen[bytes]) -> int:
        """Hears the worker to its end; its exit code."""
        deadline = time.monotonic() + LIMIT_S
        while worker.poll() is None:
            assert time.monotonic() < deadline, "the worker does not end"
            self.hear(0.05)
        while self.socket.poll(200):
            self.hear(0)
        return worker.returncode

    def await_loaded(self) -> Ready:
        self.await_(Register)
        return self.await_(Ready)

    def assign(self, request_id: int, max_steps: int = LONG, attempt: int = 1, job_name: str = "prompt") -> None:
        spec = RequestSpec(model="fake", train="0" * 64, max_steps=max_steps, job_name=job_name)
        self.send(
            Assign(
                request_id=request_id,
                attempt=attempt,
                user="alice",
                uid=1001,
                account="default",
                spec=spec,
                train=b"rows",
                eval=None,
            )
        )


class Site:
    """A folder with a broker's socket, and what is needed to start workers on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = FakeBroker(f"ipc://{folder}/b")
        self.gate = folder / "gate"
        self.gate.touch()
        self.workers: list[subprocess.Popen[bytes]] = []

    def config(self, **changes: Any) -> WorkerConfig:
        fields: dict[str, Any] = {
            "allocation": "pt-fake-1",
            "key": "right",
            "broker": self.broker.address,
            "server_public_key": None,
            "pool": "fake",
            "model": "fake",
            "model_path": str(self.gate),
            "slots": 4,
            "gpus": 0,
            "checkpoint_dir": str(self.folder),
            "bank_dir": str(self.folder),
            "heartbeat_s": 0.2,
            "orphan_timeout_s": 60.0,
            "checkpoint_s": 5.0,
            "steps": False,
        }
        return WorkerConfig(**{**fields, **changes})

    def start(self, config: WorkerConfig | None = None, **env: str) -> subprocess.Popen[bytes]:
        path = self.folder / "worker.json"
        path.touch(0o600)
        path.write_bytes(msgspec.json.encode(config or self.config()))
        plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        command = [sys.executable, "-I", str(PROCESSES / "run_worker.py"), str(path)]
        worker = subprocess.Popen(command, env={**plain, "TMPDIR": str(self.folder), **env})
        self.workers.append(worker)
        return worker

    def close(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        self.broker.end()


@pytest.fixture
def site() -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="pt"))
    site = Site(folder)
    yield site
    site.close()
    shutil.rmtree(folder)


def child_of(worker: subprocess.Popen[bytes], name: str = "pt-trainer") -> int:
    """The pid of the worker's trainer, or of that one's parent."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
        for child in children:
            if Path(f"/proc/{child}/comm").read_text() == f"{name}\n":
                return int(child)
        time.sleep(0.02)
    raise AssertionError(f"no {name}")


def await_gone(pid: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.02)


def test_registers_before_loading_and_is_ready_only_after_the_warm_up(site: Site) -> None:
    site.gate.unlink()
    site.start(PROMPTTUNER_JOB_ID="local-7")
    register = site.broker.await_(Register)
    assert (register.allocation, register.key, register.job_id) == ("pt-fake-1", "right", "local-7")
    assert not register.ready and not register.running
    site.broker.await_(Heartbeat)
    assert not [message for message in site.broker.said if isinstance(message, Ready)]
    site.gate.touch()
    ready = site.broker.await_(Ready)
    assert ready.epoch == 1 and ready.profile.per_request_s > 0
    assert {"start", "imports", "read", "to_device", "warm_up"} <= set(ready.phases_s)
    assert ready.phases_s["start"] > 0


def test_heartbeats_tell_the_trainers_memory(site: Site) -> None:
    site.start()
    site.broker.await_loaded()
    assert site.broker.await_(Heartbeat, lambda beat: beat.rss_mb > 1).epoch == 1


def test_heartbeats_tell_the_resident_models(site: Site) -> None:
    site.start()
    site.broker.await_loaded()
    assert site.broker.await_(Heartbeat, lambda beat: bool(beat.models)).models == ["fake"]


def test_a_request_is_trained_and_its_result_repeated_until_it_is_acknowledged(site: Site) -> None:
    site.start()
    site.broker.await_loaded()
    site.broker.acknowledge = False
    site.broker.assign(42, max_steps=3)
    progress = site.broker.await_(Progress, lambda progress: progress.step == 3)
    assert (progress.epoch, progress.start) == (1, "random")
    ended = site.broker.await_(Ended)
    assert ended.state is RequestState.COMPLETED and ended.files == {"adapter.bin": b"rows"} and ended.epoch == 1
    site.broker.acknowledge = True
    assert site.broker.await_(Ended) == ended
    site.broker.said.clear()
    site.broker.send(Reregister(reason="test"))
    assert site.broker.await_(Register).running == []


def test_a_stopped_request_says_nothing_more(site: Site) -> None:
    site.start()
    site.broker.await_loaded()
    site.broker.assign(1)
    site.broker.assign(2)
    site.broker.await_(Progress, lambda progress: progress.request_id == 1)
    site.broker.send(Stop(request_id=1, attempt=1, reason="cancelled"))
    site.broker.send(Reregister(reason="test"))
    assert site.broker.await_(Register).running == [Running(request_id=2, attempt=1)]
    for _ in range(10):
        assert site.broker.await_(Progress).request_id == 2


def test_a_killed_trainer_gives_its_requests_back_and_another_one_starts(site: Site) -> None:
    worker = site.start()
    site.broker.await_loaded()
    site.broker.assign(1)
    site.broker.await_(Progress)
    first, parent = child_of(worker), child_of(worker, "pt-parent")
    site.gate.unlink()
    os.kill(first, signal.SIGKILL)
    leaving = site.broker.await_(Leaving)
    assert leaving.reason == "trainer killed by signal 9" and leaving.restarting and not leaving.final
    assert leaving.given_back == [Running(request_id=1, attempt=1)]
    site.broker.assign(1, attempt=2)  # too early: the new trainer still loads
    early = site.broker.await_(Leaving)
    assert early.given_back == [Running(request_id=1, attempt=2)] and early.restarting
    site.gate.touch()
    site.broker.await_(Ready)
    assert child_of(worker) != first and child_of(worker, "pt-parent") == parent
    site.broker.assign(1, attempt=3, max_steps=2)
    assert site.broker.await_(Ended).attempt == 3


def test_the_end_of_the_trainers_parent_costs_no_request(site: Site) -> None:
    worker = site.start()
    site.broker.await_loaded()
    site.broker.assign(1)
    site.broker.await_(Progress)
    trainer, parent = child_of(worker), child_of(worker, "pt-parent")
    os.kill(parent, signal.SIGKILL)
    site.broker.assign(2, max_steps=3)
    assert site.broker.await_(Ended).request_id == 2
    assert child_of(worker) == trainer
    os.kill(trainer, signal.SIGKILL)
    assert site.broker.await_(Leaving).given_back == [Running(request_id=1, attempt=1)]
    site.broker.await_(Ready)
    assert child_of(worker, "pt-parent") != parent


def test_a_forked_trainer_measures_nothing_twice(site: Site) -> None:
    worker = site.start()
    site.broker.await_(Register)
    first = site.broker.await_(Ready)
    os.kill(child_of(worker), signal.SIGKILL)
    again = site.broker.await_(Ready)
    assert again.profile == first.profile


def test_a_fault_of_the_session_is_not_the_requests_end(site: Site) -> None:
    site.start()
    site.broker.await_loaded()
    site.broker.assign(5, job_name="crash")
    leaving = site.broker.await_(Leaving)
    assert leaving.reason == "trainer exited with code 1" and leaving.given_back == [Running(request_id=5, attempt=1)]
    site.broker.await_(Ready)


def test_a_trainer_that_never_gets_ready_ends_the_worker(site: Site) -> None:
    worker = site.start(site.config(model="crash"))
    assert site.broker.await_silence(worker) == 1
    leavings = [message for message in site.broker.said if isinstance(message, Leaving)]
    assert [leaving.restarting for leaving in leavings if not leaving.final][:2] == [True, True]
    assert leavings[-1].final and "signal 9" in leavings[-1].reason


def test_a_model_that_cannot_be_loaded_is_told_with_its_reason(site: Site) -> None:
    worker = site.start(site.config(model="unloadable"))
    assert site.broker.await_silence(worker) == 1
    leaving = site.broker.await_(Leaving, lambda leaving: leaving.final)
    assert "no model here" in leaving.reason


def test_a_restarted_broker_gets_the_worker_back_with_its_requests_and_results(site: Site) -> None:
    worker = site.start()
    site.broker.await_loaded()
    trainer = child_of(worker)
    site.broker.acknowledge = False
    site.broker.assign(1)
    site.broker.assign(2, max_steps=2)
    result = site.broker.await_(Ended)
    site.broker.await_(Progress, lambda progress: progress.request_id == 1)
    site.broker.close()
    site.broker.said.clear()
    site.broker.acknowledge, site.broker.epoch = True, 2
    site.broker.open()
    register = site.broker.await_(Register)
    assert register.ready and register.running == [Running(request_id=1, attempt=1), Running(request_id=2, attempt=1)]
    ready = site.broker.await_(Ready)
    assert ready.epoch == 2
    caught_up = site.broker.await_(Progress)
    assert (caught_up.request_id, caught_up.epoch, caught_up.start) == (1, 2, "random")
    repeated = site.broker.await_(Ended)
    assert repeated == msgspec.structs.replace(result, epoch=2)
    assert child_of(worker) == trainer


def test_attempts_that_the_broker_dropped_are_stopped(site: Site) -> None:
    site.start()
    site.broker.await_loaded()
    site.broker.assign(1)
    site.broker.await_(Progress)
    site.broker.drop = [Running(request_id=1, attempt=1)]
    site.broker.send(Reregister(reason="who are you"))
    assert site.broker.await_(Register).running
    site.broker.send(Reregister(reason="and now"))
    assert not site.broker.await_(Register).running


def test_a_wrong_key_ends_the_worker_before_anything_is_loaded(site: Site) -> None:
    site.gate.unlink()
    worker = site.start(site.config(key="wrong"))
    assert site.broker.await_silence(worker) == 4
    assert [type(message) for message in site.broker.said] == [Register]


def test_goodbye_ends_the_worker_and_its_trainer_at_once(site: Site) -> None:
    worker = site.start()
    site.broker.await_loaded()
    trainer = child_of(worker)
    site.broker.send(Goodbye(reason="another holds the slot"))
    assert site.broker.await_silence(worker) == 0
    await_gone(trainer)
    assert not (site.folder / "given_back").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_gives_everything_back_and_ends_well(site: Site, number: signal.Signals) -> None:
    worker = site.start()
    site.broker.await_loaded()
    trainer = child_of(worker)
    site.broker.assign(1)
    site.broker.await_(Progress)
    os.kill(trainer, number)  # Slurm signals every process of a step; the trainer heeds only its supervisor
    worker.send_signal(number)
    assert site.broker.await_silence(worker) == 0
    leavings = [message for message in site.broker.said if isinstance(message, Leaving)]
    assert [leaving.given_back for leaving in leavings] == [[], [Running(request_id=1, attempt=1)], []]
    assert [leaving.final for leaving in leavings] == [False, False, True]
    assert leavings[0].reason == f"signal {number.name}"
    assert (site.folder / "given_back").exists()


def test_a_signal_while_loading_ends_at_once(site: Site) -> None:
    site.gate.unlink()
    worker = site.start()
    site.broker.await_(Register)
    trainer = child_of(worker)
    worker.send_signal(signal.SIGTERM)
    assert site.broker.await_silence(worker) == 0
    await_gone(trainer)
    assert site.broker.await_(Leaving, lambda leaving: leaving.final)


def test_a_drained_worker_gives_back_and_takes_nothing_new(site: Site) -> None:
    worker = site.start()
    site.broker.await_loaded()
    site.broker.assign(1)
    site.broker.await_(Progress)
    site.broker.send(Drain(reason="idle"))
    site.broker.assign(2)
    assert site.broker.await_silence(worker) == 0
    leavings = [message for message in site.broker.said if isinstance(message, Leaving)]
    back = [attempt.request_id for leaving in leavings for attempt in leaving.given_back]
    assert sorted(back) == [1, 2] and not [leaving for leaving in leavings if leaving.restarting]


def test_a_worker_leaves_before_its_allocation_ends(site: Site) -> None:
    worker = site.start(SLURM_JOB_ID="77", SLURM_JOB_END_TIME=str(int(time.time()) + 3), SLURM_RESTART_COUNT="2")
    register = site.broker.await_(Register)
    assert register.job_id == "77" and register.restart_count == 2 and register.end_unix_s > time.time()
    assert site.broker.await_silence(worker) == 0
    assert "time limit" in site.broker.await_(Leaving).reason


def test_the_end_of_the_allocation_is_asked_from_squeue_where_the_environment_lacks_it(site: Site) -> None:
    squeue = site.folder / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$*" = "-h -j 77 -o %e" ] && echo 2040-01-02T03:04:05\n')
    squeue.chmod(0o755)
    site.start(site.config(srun=str(site.folder / "srun")), SLURM_JOB_ID="77")
    told = site.broker.await_(Register, lambda register: register.end_unix_s > 0)
    assert time.localtime(told.end_unix_s)[:6] == (2040, 1, 2, 3, 4, 5)


def test_a_worker_without_a_broker_trains_on_then_ends_itself(site: Site) -> None:
    worker = site.start(site.config(orphan_timeout_s=1.5))
    site.broker.await_loaded()
    site.broker.assign(1)
    site.broker.await_(Progress)
    trainer = child_of(worker)
    site.broker.close()
    assert worker.wait(LIMIT_S) == 3
    assert (site.folder / "given_back").exists()
    await_gone(trainer)
    site.broker.open()


def test_a_silent_broker_is_registered_with_again(site: Site) -> None:
    site.start()
    site.broker.await_loaded()
    site.broker.mute = True
    assert site.broker.await_(Register).ready
    site.broker.mute = False
    assert site.broker.await_(Ready)


def test_the_trainer_dies_with_its_supervisor(site: Site) -> None:
    worker = site.start()
    site.broker.await_loaded()
    trainer = child_of(worker)
    worker.kill()
    await_gone(trainer)


def test_no_socket_folder_is_left_behind(site: Site) -> None:
    site.gate.unlink()
    worker = site.start()
    site.broker.await_(Register)
    [folder] = site.folder.glob("pt-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    site.gate.touch()
    site.broker.await_(Ready)
    worker.kill()
    worker.wait()
    assert not list(site.folder.glob("pt-*"))


def test_a_temporary_folder_with_a_path_too_long_for_a_socket_does_no_harm(site: Site) -> None:
    deep = site.folder / ("x" * 100)
    deep.mkdir()
    site.start(TMPDIR=str(deep))
    site.broker.await_loaded()


def test_over_tcp_the_broker_proves_itself_by_its_key(site: Site) -> None:
    public, secret = zmq.curve_keypair()
    site.broker.end()
    site.broker = FakeBroker("tcp://127.0.0.1:*", secret)
    site.start(site.config(server_public_key=public.decode()))
    site.broker.await_loaded()


def test_over_tcp_a_broker_without_a_key_is_refused(site: Site) -> None:
    worker = site.start(site.config(broker="tcp://127.0.0.1:1"))
    assert worker.wait(LIMIT_S) == 5


def test_each_request_shows_as_a_step_that_ends_with_it(site: Site) -> None:
    srun = site.folder / "srun"
    lines = [f"cd {site.folder}", 'echo "$*" >> calls', "echo 77.3", "read code", "echo $code >> codes"]
    srun.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    srun.chmod(0o755)
    site.start(site.config(srun=str(srun), steps=True), SLURM_JOB_ID="77", SLURM_JOB_END_TIME="4000000000")
    site.broker.await_loaded()
    site.broker.assign(42)
    assert site.broker.await_(Progress, lambda progress: progress.step_id == "77.3").request_id == 42
    assert site.broker.await_(Progress, lambda progress: progress.step > 3).step_id == "77.3"
    site.broker.send(Stop(request_id=42, attempt=1, reason="cancelled"))
    deadline = time.monotonic() + LIMIT_S
    while not (site.folder / "codes").exists() or not (site.folder / "codes").read_text():
        assert time.monotonic() < deadline, "the step does not end"
        site.broker.hear(0.02)
    assert (site.folder / "codes").read_text() == "1\n"
    assert "--jobid=77 " in (site.folder / "calls").read_text()
    assert "--job-name=req-42.alice " in (site.folder / "calls").read_text()


def test_an_srun_that_hangs_delays_no_request(site: Site) -> None:
    srun = site.folder / "srun"
    srun.write_text("#!/bin/sh\nexec sleep 600\n")
    srun.chmod(0o755)
    worker = site.start(site.config(srun=str(srun), steps=True), SLURM_JOB_ID="77", SLURM_JOB_END_TIME="4000000000")
    site.broker.await_loaded()
    for request_id in range(1, 5):
        site.broker.assign(request_id, max_steps=3)
    assert {site.broker.await_(Ended).request_id for _ in range(4)} == {1, 2, 3, 4}
    worker.send_signal(signal.SIGTERM)
    assert site.broker.await_silence(worker) == 0

"""The real trainers, forked from one parent: the same losses from each, and none outlives whoever ordered it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from broker.protocol.config import WorkerConfig
from broker.protocol.messages import Assign, Ended, Profile
from broker.protocol.states import RequestState
from tuner.forkserver import ForkServer
from tuner.link import Loaded, Resident, encode, from_trainer_decoder
from tuner.supervisor import TRAINER_COMMAND

LIMIT_S = 120.0


class Hand:
    """What a supervisor does with its trainers."""

    def __init__(self, folder: Path, models: dict[str, Path]) -> None:
        config = WorkerConfig(
            allocation="a",
            key="",
            broker="",
            server_public_key=None,
            pool="p",
            model="llama",
            model_path=str(models["llama"]),
            slots=8,
            gpus=0,
            checkpoint_dir=str(folder / "spool" / "checkpoints"),
            bank_dir=str(folder / "bank"),
            heartbeat_s=5.0,
            orphan_timeout_s=60.0,
            checkpoint_s=1e9,
            steps=False,
            more_models={"gpt2": str(models["gpt2"])},
        )
        file = folder / "worker.json"
        file.touch(0o600)
        file.write_bytes(msgspec.json.encode(config))
        self.folder = folder
        self.trainers = ForkServer(TRAINER_COMMAND, file)
        self.context = zmq.Context()
        self.orders = 0

    def start(self, profile: Profile | None = None) -> tuple[zmq.Socket[bytes], Loaded]:
        self.orders += 1
        link = self.context.socket(zmq.PAIR)
        link.linger = 0
        link.bind(f"ipc://{self.folder}/{self.orders}")
        self.trainers.start(f"ipc://{self.folder}/{self.orders}", profile, os.environ)
        loaded = hear(link, Loaded)
        assert self.trainers.poll() is None
        return link, loaded

    def close(self) -> None:
        self.trainers.close()
        self.context.destroy(linger=0)


def hear(link: zmq.Socket[bytes], kind: type[Any]) -> Any:
    """The next message of `kind`."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        assert link.poll(max(0, (deadline - time.monotonic()) * 1000)), f"no {kind.__name__}"
        said = from_trainer_decoder.decode(link.recv())
        if isinstance(said, kind):
            return said


@pytest.fixture
def hand(model_dirs: dict[str, Path]) -> Iterator[Hand]:
    folder = Path(tempfile.mkdtemp(prefix="pt"))
    hand = Hand(folder, model_dirs)
    yield hand
    hand.close()
    shutil.rmtree(folder)


def test_every_forked_trainer_trains_alike_and_the_second_one_imports_nothing(
    hand: Hand, make_request: Callable[..., Assign]
) -> None:
    ends, loads = [], []
    for request_id in (1, 2):
        link, loaded = hand.start(loads[0].profile if loads else None)
        link.send(encode(make_request(request_id, max_steps=12)))
        ends.append(hear(link, Ended))
        loads.append(loaded)
        hand.trainers.stop()
        link.close()
    assert ends[0].files["adapter_model.safetensors"] == ends[1].files["adapter_model.safetensors"]
    assert (ends[0].loss, ends[0].step) == (ends[1].loss, ends[1].step)
    assert loads[1].profile == loads[0].profile
    assert set(loads[0].phases_s) == {"imports", "read", "to_device", "first_step", "warm_up"}
    assert set(loads[1].phases_s) == {"imports", "read", "to_device", "first_step"}


def test_another_models_request_is_trained_on_that_model_and_both_stay(
    hand: Hand, make_request: Callable[..., Assign]
) -> None:
    link, _ = hand.start()
    link.send(encode(make_request(1, model="gpt2", max_steps=3)))
    while hear(link, Resident).models != ["gpt2", "llama"]:
        pass  # the first one, alone
    assert hear(link, Ended).state is RequestState.COMPLETED


def test_a_trainer_that_is_ordered_and_stopped_never_comes_to_be(hand: Hand) -> None:
    hand.trainers.start(f"ipc://{hand.folder}/x", None, os.environ)
    pid = hand.trainers.pid
    hand.trainers.stop()
    assert not Path(f"/proc/{pid}").exists()
    assert hand.trainers.poll() is None


def test_a_parent_that_cannot_start_is_told_like_a_trainer_that_ended(hand: Hand) -> None:
    (hand.folder / "worker.json").chmod(0o644)
    hand.trainers.start(f"ipc://{hand.folder}/x", None, os.environ)
    deadline = time.monotonic() + LIMIT_S
    while (code := hand.trainers.poll()) is None:
        assert time.monotonic() < deadline, "nothing is told"
        time.sleep(0.01)
    assert code != 0

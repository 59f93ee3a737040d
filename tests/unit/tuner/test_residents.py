"""Several models in one worker: loaded beside training, kept while there is room, each request on its own one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from broker.protocol.errors import ConfigError
from broker.protocol.messages import Assign, Ended, Running
from broker.protocol.states import RequestState
from tuner import session as session_module
from tuner.model import Disturbing
from tuner.residents import Residents
from tuner.session import Session


class FakeWeights:
    device_bytes = 10
    placed = True

    def place(self) -> float:
        self.placed = True
        return 0.01

    def withdraw(self) -> None:
        self.placed = False


def residents(room: int, load: Any = None) -> Residents:
    def plain(path: str, beside: bool) -> Any:
        return SimpleNamespace(weights=FakeWeights(), path=path), {"read": 0.1}

    return Residents({name: f"/{name}" for name in "abc"}, load or plain, lambda: room)


def test_the_longest_unused_model_leaves_the_device() -> None:
    models = residents(room=20)
    for name in "ab":
        models.load(name)
    models.use("a")
    models.load("c")
    models.withdraw("c")
    models.use("c")
    assert [models.placed(name) for name in "abc"] == [True, False, True]
    models.use("c")
    models.use("b")
    assert [models.placed(name) for name in "abc"] == [False, True, True]
    assert models.names == ["b", "c", "a"]
    assert models["b"].phases_s == {"read": 0.1, "swap": 0.01}


def test_a_model_larger_than_the_room_is_alone_on_the_device() -> None:
    models = residents(room=5)
    models.load("a")
    models.load("b")
    models.withdraw("b")
    models.use("b")
    assert [models.placed(name) for name in "ab"] == [False, True]


def test_an_unknown_model_is_told() -> None:
    with pytest.raises(ConfigError, match="no model d"):
        residents(room=20).begin("d")


def test_a_model_that_cannot_load_beside_training_is_loaded_by_the_thread_that_trains() -> None:
    asked = []

    def load(path: str, beside: bool) -> Any:
        asked.append(beside)
        if beside:
            raise Disturbing(path)
        return SimpleNamespace(weights=FakeWeights()), {}

    models = residents(20, load)
    models.begin("a")
    models.wait(60)
    assert models.ready("a") and asked == [True, False]


def test_a_load_that_fails_is_told_once_and_can_be_tried_again() -> None:
    def load(path: str, beside: bool) -> Any:
        raise ConfigError("damaged")

    models = residents(20, load)
    for _ in range(2):
        models.begin("a")
        models.wait(60)
        with pytest.raises(ConfigError, match="damaged"):
            models.ready("a")
        assert not models.ready("a") and models.pending == []


# --- sessions of two models -----------------------------------------------------------------------------------------

MakeRequest = Callable[..., Assign]


@pytest.fixture
def make_two(model_dirs: dict[str, Path], tmp_path: Path) -> Callable[..., Session]:
    def make(**more: str) -> Session:
        session = Session(
            model_path=str(model_dirs["llama"]),
            bank_dir=tmp_path / "bank",
            checkpoint_dir=tmp_path / "checkpoints",
            checkpoint_s=1e9,
            slots=8,
            model="llama",
            more_models=more or {"gpt2": str(model_dirs["gpt2"])},
        )
        session.load()
        return session

    return make


def drive(session: Session, assigns: list[Assign]) -> dict[int, Ended]:
    ended: dict[int, Ended] = {}
    for assign in assigns:
        session.join(assign)
    while session.busy:
        ended |= {said.request_id: said for said in session.step() if isinstance(said, Ended)}
    return ended


def prompt_of(ended: Ended) -> torch.Tensor:
    return safetensors.torch.load(ended.files["adapter_model.safetensors"])["prompt_embeddings"]


@pytest.mark.parametrize("crowded", [False, True])
def test_requests_of_two_models_end_as_each_would_alone(
    make_two: Callable[..., Session],
    make_session: Callable[..., Session],
    make_request: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
    crowded: bool,
) -> None:
    if crowded:  # as on a device that has room for one of them
        monkeypatch.setattr(session_module, "room_bytes", lambda: 0)
        monkeypatch.setattr(session_module, "_RESIDENCE_S", 0.05)
        monkeypatch.setattr("tuner.weights.Weights.device_bytes", 1)
    session = make_two()
    first, second = make_request(1, model="llama", max_steps=20), make_request(2, model="gpt2", max_steps=15)
    ended = drive(session, [second, first])
    assert sorted(session.resident_models) == ["gpt2", "llama"]
    for family, assign in (("llama", first), ("gpt2", second)):
        alone = drive(make_session(family), [assign])[assign.request_id]
        assert ended[assign.request_id].state is RequestState.COMPLETED
        assert ended[assign.request_id].step == alone.step
        assert torch.equal(prompt_of(ended[assign.request_id]), prompt_of(alone))


def test_training_goes_on_while_another_model_loads(
    make_two: Callable[..., Session], make_request: MakeRequest
) -> None:
    session = make_two()
    session.join(make_request(1, max_steps=1000, eval_every=1))
    session.step()
    session.join(make_request(2, model="gpt2", max_steps=1))
    assert session.running() == [Running(request_id=1, attempt=1), Running(request_id=2, attempt=1)]
    steps = set()
    while 2 not in steps:
        said = session.step()
        steps |= {message.request_id for message in said if isinstance(message, Ended)}
        assert not any(isinstance(message, Ended) and message.request_id == 1 for message in said)
    session.stop(1, attempt=1)
    assert not session.busy


def test_a_request_whose_model_cannot_be_loaded_fails_alone(
    make_two: Callable[..., Session], make_request: MakeRequest, tmp_path: Path
) -> None:
    session = make_two(gone=str(tmp_path / "nowhere"))
    ended = drive(session, [make_request(1, max_steps=5), make_request(2, model="gone")])
    assert ended[1].state is RequestState.COMPLETED
    assert ended[2].state is RequestState.FAILED and "is not there" in ended[2].error


def test_a_request_that_waits_for_its_model_can_be_stopped_and_given_back(
    make_two: Callable[..., Session], make_request: MakeRequest
) -> None:
    session = make_two()
    session.join(make_request(1, model="gpt2"))
    session.join(make_request(2, model="gpt2"))
    session.stop(1, attempt=1)
    assert session.give_back() == [Running(request_id=2, attempt=1)]
    while session.busy:  # the load itself ends
        assert session.step() == []
    assert sorted(session.resident_models) == ["gpt2", "llama"]


def test_swapping_makes_a_resident_model_the_current_one(make_two: Callable[..., Session]) -> None:
    session = make_two()
    session.begin_load("gpt2")
    while not session.take_loaded():
        session._residents.wait(1.0)
    session.withdraw("gpt2")
    session.swap("gpt2")
    assert session.first_step() > 0
    assert session.resident_models == ["gpt2", "llama"]
    assert set(session.phases_s("gpt2")) >= {"imports", "read", "to_device"}


def test_a_second_model_that_must_be_converted_trains_as_it_would_alone(
    make_two: Callable[..., Session], make_request: MakeRequest, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(model_dirs["gpt2"], half)
    weights = safetensors.torch.load_file(half / "model.safetensors")
    halved = {name: tensor.half() for name, tensor in weights.items()}
    safetensors.torch.save_file(halved, half / "model.safetensors", {"format": "pt"})
    session = make_two(half=str(half))
    assign = make_request(1, model="half", max_steps=8)
    beside = drive(session, [assign, make_request(2, max_steps=8)])[1]
    assert session.phases_s("half")["swap"] > 0
    lone = Session(
        model_path=str(half), bank_dir=tmp_path / "b", checkpoint_dir=tmp_path / "c", checkpoint_s=1e9, slots=1
    )
    lone.load()
    assert torch.equal(prompt_of(beside), prompt_of(drive(lone, [assign])[1]))


def test_results_name_the_base_that_they_were_tuned_on(
    make_two: Callable[..., Session], make_request: MakeRequest
) -> None:
    ended = drive(make_two(), [make_request(1, max_steps=2), make_request(2, model="gpt2", max_steps=2)])
    digests = {json.loads(end.files["prompttuner.json"])["base_digest"] for end in ended.values()}
    assert len(digests) == 2

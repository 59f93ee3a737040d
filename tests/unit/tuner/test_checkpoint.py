"""A checkpoint gives back exactly what was kept, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from broker.protocol.messages import Assign
from tuner.checkpoint import Checkpoints
from tuner.data import BatchOrder, load_dataset
from tuner.model import Base
from tuner.optimizer import PromptState
from tuner.run import History, Point, Run

MakeRequest = Callable[..., Assign]
DIGEST = "d" * 64


def made_up_run(base: Base, assign: Assign) -> Run:
    torch.manual_seed(assign.attempt)
    data = load_dataset(base, assign.spec, assign.train, None)
    prompt, m, v, best = torch.randn(4, 4, base.hidden_size).unbind()
    points = [Point(0, 3.0, 0.0), Point(5, 2.0, 0.5)]
    history = History("bank:abc", 0.02, 1234.5, points, points[1])
    order = BatchOrder(len(data.train), 8, 0)
    return Run(assign, data, order, PromptState(prompt=prompt, m=m, v=v, step=7), best, history)


def test_all_of_a_run_comes_back_bit_by_bit(base: Base, make_request: MakeRequest, tmp_path: Path) -> None:
    run, checkpoints = made_up_run(base, make_request()), Checkpoints(tmp_path / "new" / "folder")
    assert checkpoints.save(run, DIGEST)
    kept = checkpoints.load(1, DIGEST, base, 4)
    assert kept is not None
    assert (kept.state.step, kept.history) == (7, run.history)
    for ours, theirs in [
        (kept.state.prompt, run.state.prompt),
        (kept.state.m, run.state.m),
        (kept.state.v, run.state.v),
        (kept.best_prompt, run.best_prompt),
    ]:
        assert torch.equal(ours, theirs)


def test_a_later_attempts_file_is_not_replaced(base: Base, make_request: MakeRequest, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.save(made_up_run(base, make_request(attempt=2)), DIGEST)
    before = (tmp_path / "1.safetensors").read_bytes()
    assert not checkpoints.save(made_up_run(base, make_request(attempt=1)), DIGEST)
    checkpoints.remove(1, attempt=1)
    assert (tmp_path / "1.safetensors").read_bytes() == before
    assert checkpoints.save(made_up_run(base, make_request(attempt=3)), DIGEST)
    checkpoints.remove(1, attempt=3)
    assert list(tmp_path.iterdir()) == []


def test_there_is_nothing_for_other_settings_other_requests_or_another_length(
    base: Base, make_request: MakeRequest, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(made_up_run(base, make_request()), DIGEST)
    assert checkpoints.load(1, "e" * 64, base, 4) is None
    assert checkpoints.load(2, DIGEST, base, 4) is None
    assert checkpoints.load(1, DIGEST, base, 5) is None


@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: b"", lambda data: b"\xff" * 100])
def test_a_damaged_file_is_none_and_is_replaced(
    base: Base, make_request: MakeRequest, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    checkpoints, path = Checkpoints(tmp_path), tmp_path / "1.safetensors"
    checkpoints.save(made_up_run(base, make_request()), DIGEST)
    path.write_bytes(damage(path.read_bytes()))
    assert checkpoints.load(1, DIGEST, base, 4) is None
    assert checkpoints.save(made_up_run(base, make_request()), DIGEST)
    assert checkpoints.load(1, DIGEST, base, 4) is not None

"""A pass has as many tokens as fit; what does not fit is tried in smaller ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tuner import memory
from tuner.memory import Budget, bytes_per_request, usable_bytes
from tuner.model import Base


def test_a_token_takes_what_every_layer_keeps_of_it(base: Base) -> None:
    budget = Budget.of(base)
    assert budget.bytes_per_token == pytest.approx(14.4 * base.hidden_size * base.layers * 4)
    assert 1000 < budget.max_tokens <= usable_bytes(torch.device("cpu")) / budget.bytes_per_token * 2
    assert budget.row_bytes(100) > 100 * budget.bytes_per_token
    assert bytes_per_request(base, 20) == 2 * bytes_per_request(base, 10) > 10 * base.hidden_size * 4 * 4


def test_work_is_tried_with_fewer_tokens_until_it_fits() -> None:
    budget, tried = Budget(1.0, 1000), []

    def work(most: int) -> str:
        tried.append(most)
        if most > 100:
            raise MemoryError
        return "done"

    assert budget.within(work, lambda most: min(most, 640)) == "done"
    assert tried == [1000, 320, 160, 80]
    assert budget.max_tokens == 80  # the next step begins there


def test_work_that_no_splitting_helps_fails_and_other_errors_pass() -> None:
    def full(_: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def broken(_: int) -> None:
        raise RuntimeError("device-side assert")

    budget = Budget(1.0, 1000)
    with pytest.raises(RuntimeError, match="allocate"):
        budget.within(full, lambda most: 64 if most > 50 else 0)
    with pytest.raises(RuntimeError, match="assert"):
        budget.within(broken, lambda _: 64)


def test_the_limits_above_a_process_count_without_the_pages_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def group(path: Path, limit: str) -> None:
        path.mkdir(exist_ok=True)
        (path / "memory.max").write_text(f"{limit}\n")
        (path / "memory.current").write_text("900\n")
        (path / "memory.stat").write_text("anon 300\nactive_file 200\ninactive_file 400\n")

    (tmp_path / "own").write_text("0::/job/step\n")
    (tmp_path / "job" / "step").mkdir(parents=True)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "own")
    assert memory._cgroup_room_bytes() == []
    group(tmp_path / "job", "1000")
    group(tmp_path / "job" / "step", "max")
    assert memory._cgroup_room_bytes() == [700]
    assert memory._free_bytes(torch.device("cpu")) == 700

"""A base model is given only the shortcuts that it allows."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner import ways
from tuner.model import Base
from tuner.ways import fastest, known_fastest

FAMILIES = ["llama", "gpt2", "qwen2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_usual_families_allow_all(bases: dict[str, Base], family: str, caplog: pytest.LogCaptureFixture) -> None:
    found = fastest(bases[family]).ways
    assert found.shared_prefix and found.bare_head and found.pass_tokens > 0
    assert not caplog.records


def test_a_head_with_more_behind_it_is_left_whole(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(base.model)
    whole = model.forward

    def capped(**options: Any) -> Any:
        told = whole(**options)
        told.logits = 2.0 * torch.tanh(told.logits / 2.0)
        return told

    model.forward = capped
    with caplog.at_level(logging.WARNING):
        found = fastest(dataclasses.replace(base, model=model)).ways
    assert (found.bare_head, found.shared_prefix) == (False, True)
    [record] = caplog.records
    assert "no bare_head: its logits differ" in record.getMessage()


@pytest.mark.parametrize("fault", ["detached", "refused", "forgotten"])
def test_a_model_whose_cache_does_not_allow_it_keeps_the_plain_way(
    base: Base, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    real = ways.prefix_of

    def broken(*given: Any) -> Any:
        prefix = real(*given)
        if fault == "refused":
            raise ValueError("no cache of this kind\nsecond line")
        if fault == "detached":
            prefix.computed = [tensor.detach().requires_grad_(True) for tensor in prefix.computed]
        else:
            prefix.held = [(_nothing(keys), _nothing(values)) for keys, values in prefix.held]
        return prefix

    monkeypatch.setattr(ways, "prefix_of", broken)
    with caplog.at_level(logging.WARNING):
        found = fastest(base).ways
    assert (found.bare_head, found.shared_prefix) == (True, False)
    [record] = caplog.records
    assert "no shared_prefix" in record.getMessage()
    assert "second line" not in record.getMessage()


def _nothing(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like, requires_grad=True)


def test_what_was_tried_once_is_not_tried_again_until_the_files_change(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def counted(base: Base) -> Base:
        tried.append(base.path)
        return fastest(base)

    monkeypatch.setattr(ways, "fastest", counted)
    model = tmp_path / "model"
    shutil.copytree(base.path, model)
    here = dataclasses.replace(base, path=str(model))
    found = [known_fastest(here, tmp_path / "kept").ways for _ in range(3)]
    assert found == [fastest(base).ways] * 3 and len(tried) == 1
    os.utime(model / "config.json", ns=(1, 1))
    assert known_fastest(here, tmp_path / "kept").ways == found[0] and len(tried) == 2
    kept = next((tmp_path / "kept").glob("*.ways-*.json"))
    kept.write_text('{"files": 3}')
    assert known_fastest(here, tmp_path / "kept").ways == found[0] and len(tried) == 3

"""The result is a folder that stock PEFT loads, with the loss that was reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from broker.protocol.messages import Assign, Ended
from tuner.session import Session


def completed(session: Session, assign: Assign) -> Ended:
    session.join(assign)
    while True:
        for said in session.step():
            if isinstance(said, Ended):
                return said


def peft_loss(model_dir: Path, adapter_dir: Path, rows: bytes) -> float:
    """Mean loss of a target token, by stock libraries only."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    total, count = 0.0, 0
    for line in rows.splitlines():
        row = json.loads(line)
        given = tokenizer(row["input"], add_special_tokens=False)["input_ids"]
        wanted = [*tokenizer(row["target"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*given, *wanted]])).logits[0, -len(wanted) - 1 : -1]
        total += functional.cross_entropy(logits, torch.tensor(wanted), reduction="sum").item()
        count += len(wanted)
    return total / count


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_stock_peft_loads_the_folder_and_has_the_reported_loss(
    make_session: Callable[..., Session],
    make_request: Callable[..., Assign],
    make_rows: Callable[..., bytes],
    model_dirs: dict[str, Path],
    tmp_path: Path,
    family: str,
) -> None:
    evaluation = make_rows(12, first=100)
    ended = completed(make_session(family), make_request(evaluation=evaluation, max_steps=20))
    folder = tmp_path / "result"
    folder.mkdir()
    for name, data in ended.files.items():
        (folder / name).write_bytes(data)
    assert peft_loss(model_dirs[family], folder, evaluation) == pytest.approx(ended.loss, abs=1e-3)


def test_the_configuration_says_what_peft_itself_would_write(
    make_session: Callable[..., Session], make_request: Callable[..., Assign]
) -> None:
    ours = json.loads(completed(make_session(), make_request(max_steps=1)).files["adapter_config.json"])
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(ours["base_model_name_or_path"]),
        peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=4, inference_mode=True),
    )
    theirs = model.peft_config["default"].to_dict()
    assert {name: theirs[name] for name in ours} == ours


def test_the_report_holds_settings_metrics_and_curve(
    make_session: Callable[..., Session], make_request: Callable[..., Assign]
) -> None:
    ended = completed(make_session(), make_request(max_steps=7, metric="accuracy", seed=5))
    report = json.loads(ended.files["prompttuner.json"])
    assert report["spec"]["seed"] == 5
    assert [point["step"] for point in report["curve"]] == [0, 5, 7]
    assert report["best"] in report["curve"]
    assert (ended.loss, ended.score) == (report["best"]["loss"], report["best"]["accuracy"])
    assert len(report["base_digest"]) == 64
    assert report["start"] == "random"

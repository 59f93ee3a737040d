"""Any family of causal language models trains, and stock libraries use what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from broker.protocol.messages import Assign, Ended
from broker.protocol.states import RequestState
from tests.stock_peft import loss_of
from tuner.bundle import check_base
from tuner.session import Session


def completed(session: Session, assign: Assign) -> Ended:
    session.join(assign)
    while True:
        for said in session.step():
            if isinstance(said, Ended):
                return said


@pytest.mark.parametrize("family", ["gemma", "gpt_neox", "mistral", "qwen2", "llama", "gpt2"])
def test_a_family_trains_and_stock_peft_loads_measures_and_generates(
    make_session: Callable[..., Session],
    make_request: Callable[..., Assign],
    make_rows: Callable[..., bytes],
    make_model_dir: Callable[[str], Path],
    tmp_path: Path,
    family: str,
) -> None:
    evaluation, folder, model_dir = make_rows(12, first=100), tmp_path / "result", make_model_dir(family)
    ended = completed(make_session(family), make_request(evaluation=evaluation, max_steps=20))
    assert ended.state is RequestState.COMPLETED, ended.error
    folder.mkdir()
    for name, data in ended.files.items():
        (folder / name).write_bytes(data)
    report = json.loads(ended.files["prompttuner.json"])
    assert report["best"]["step"] > 0 and report["best"]["loss"] < report["curve"][0]["loss"]
    check_base(folder, model_dir)
    (tmp_path / "eval.jsonl").write_bytes(evaluation)
    assert loss_of(model_dir, folder, tmp_path / "eval.jsonl") == pytest.approx(ended.loss, abs=1e-3)

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), folder).eval()
    asked = tokenizer("a b c", return_tensors="pt", add_special_tokens=False)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(asked)}
    said = model.generate(input_ids=asked, eos_token_id=None, **options)
    assert said.shape == (1, asked.shape[1] + 4)
    with torch.no_grad():
        likeliest = model(input_ids=asked).logits[0, -1].argmax().item()
    assert said[0, asked.shape[1]].item() == likeliest  # the prompt stands before what generate reads

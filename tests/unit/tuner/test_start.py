"""The first prompt: the best that the bank has for the task, or neutral noise, or a text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bank.entries import Entry
from bank.store import Bank
from broker.protocol.errors import DataError
from broker.protocol.messages import Assign
from tuner import packing
from tuner import start as starts
from tuner.data import load_dataset
from tuner.model import Base
from tuner.optimizer import PromptState, StepRule, update
from tuner.start import Start, first_prompt, random_prompt


def publish(bank: Bank, base: Base, prompt: torch.Tensor, **fields: Any) -> str:
    settings: dict[str, Any] = {
        "digest": "0" * 64,
        "base_digest": base.digest,
        "virtual_tokens": len(prompt),
        "hidden_size": base.hidden_size,
        "uid": 1000,
        "user": "alice",
        "account": "physics",
        "share": "private",
        "metric": "loss",
        "score": 0.1,
        "loss": 0.1,
        "steps": 9,
        "start": "random",
        "created_unix_s": 1000.0,
        "converged": True,
    }
    return bank.publish(prompt.numpy(), Entry(**(settings | fields)))


def start(base: Base, bank: Bank, assign: Assign) -> Start:
    data = load_dataset(base, assign.spec, assign.train, assign.eval)
    return first_prompt(base, bank, assign, data.train)


def tuned(base: Base, assign: Assign, steps: int = 15) -> torch.Tensor:
    """A prompt that is good at the task."""
    data = load_dataset(base, assign.spec, assign.train, assign.eval)
    state = PromptState.new(random_prompt(base, assign.spec.virtual_tokens, 99))
    for _ in range(steps):
        _, slope = packing.gradient(base, [state.prompt], [(0, row) for row in data.train])
        update([state], [StepRule(0.3)], slope, base.embedding_rms)
    return state.prompt


def test_a_random_start_has_the_size_of_the_bases_embeddings_and_follows_the_seed(base: Base) -> None:
    prompt = random_prompt(base, 400, seed=5)
    assert prompt.pow(2).mean().sqrt().item() == pytest.approx(base.embedding_rms, rel=0.05)
    assert torch.equal(prompt, random_prompt(base, 400, seed=5))
    assert not torch.equal(prompt, random_prompt(base, 400, seed=6))


def test_an_empty_bank_gives_the_random_start(base: Base, make_request, tmp_path: Path) -> None:
    found = start(base, Bank(tmp_path), make_request(init="bank", seed=4))
    assert found.name == "random"
    assert torch.equal(found.prompt, random_prompt(base, 4, 4))


def test_the_bank_prompt_of_lowest_loss_is_taken(base: Base, make_request, tmp_path: Path) -> None:
    bank, assign = Bank(tmp_path), make_request(init="bank")
    good = tuned(base, assign)
    digest = publish(bank, base, good, created_unix_s=1.0)
    for seed in range(3):
        publish(bank, base, random_prompt(base, 4, 50 + seed), created_unix_s=2.0 + seed)
    found = start(base, bank, assign)
    assert found.name == f"bank:{digest[:12]}"
    assert torch.equal(found.prompt, good)
    assert found.lookup_s > 0


def test_a_bank_with_nothing_better_than_noise_gives_noise(base: Base, make_request, tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    publish(bank, base, torch.full((4, base.hidden_size), 50.0))
    assert start(base, bank, make_request(init="bank")).name == "random"


def test_a_prompt_that_is_worse_than_a_uniform_guess_starts_nothing(
    base: Base, make_request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, guess = Bank(tmp_path), math.log(base.vocabulary)
    publish(bank, base, random_prompt(base, 4, 50))
    for bank_loss, name in [(guess + 0.1, "random"), (guess - 0.1, "bank:"), (math.nan, "random")]:
        scores = [packing.Score(loss=guess + 5.0, accuracy=0.0), packing.Score(loss=bank_loss, accuracy=0.0)]
        monkeypatch.setattr(starts, "score", lambda *_, told=scores: told)
        assert start(base, bank, make_request(init="bank")).name.startswith(name)


@pytest.mark.parametrize(("limit", "found"), [(9, True), (8, False)])
def test_no_more_than_the_newest_few_are_looked_at(
    base: Base, make_request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, found: bool
) -> None:
    monkeypatch.setattr(starts, "_CANDIDATES", limit)
    bank, assign = Bank(tmp_path), make_request(init="bank")
    publish(bank, base, tuned(base, assign), created_unix_s=1.0)
    for seed in range(8):
        publish(bank, base, torch.full((4, base.hidden_size), 50.0 + seed), created_unix_s=2.0 + seed)
    assert start(base, bank, assign).name.startswith("bank:") is found


def test_anothers_private_prompt_starts_nothing(base: Base, make_request, tmp_path: Path) -> None:
    bank, assign = Bank(tmp_path), make_request(init="bank")
    publish(bank, base, tuned(base, assign), uid=1001, user="bob")
    assert start(base, bank, assign).name == "random"


def test_a_damaged_prompt_is_passed_over(base: Base, make_request, tmp_path: Path) -> None:
    bank, assign = Bank(tmp_path), make_request(init="bank")
    publish(bank, base, tuned(base, assign))
    (kept,) = tmp_path.rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-7])
    assert start(base, bank, assign).name == "random"


def test_a_text_start_repeats_or_cuts_the_texts_embeddings(base: Base, make_request, tmp_path: Path) -> None:
    for tokens, expected in [(5, [3, 4, 3, 4, 3]), (1, [3])]:
        found = start(base, Bank(tmp_path), make_request(init="text", init_text="a b", virtual_tokens=tokens))
        assert found.name == "text"
        assert torch.equal(found.prompt, base.embed(torch.tensor(expected)))


def test_a_text_start_without_a_text_is_refused(base: Base, make_request, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokens"):
        start(base, Bank(tmp_path), make_request(init="text"))

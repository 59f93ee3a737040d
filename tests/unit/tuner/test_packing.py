"""A packed pass gives each request what it would have alone, and what stock PEFT computes."""

from __future__ import annotations

import copy
import dataclasses

import peft
import pytest
import torch
from torch.nn import functional

from tuner import packing
from tuner.data import Example, read_examples
from tuner.forward import collate, plain_logits
from tuner.model import Base
from tuner.start import random_prompt
from tuner.ways import fastest

FAMILIES = ["llama", "gpt2", "qwen2"]


def examples(base: Base, rows: bytes) -> list[Example]:
    return read_examples(base, rows, 40, "training")


def peft_loss_and_gradient(base: Base, prompt: torch.Tensor, rows: list[Example]) -> tuple[float, torch.Tensor]:
    config = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=len(prompt))
    model = peft.get_peft_model(copy.deepcopy(base.model), config)
    model.eval()
    weight = model.prompt_encoder["default"].embedding.weight
    weight.data.copy_(prompt)
    width = max(map(len, rows))
    ids = torch.tensor([[*row.tokens, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        labels[i, len(row) - row.targets : len(row)] = torch.tensor(row.tokens[-row.targets :])
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    return loss.item(), weight.grad


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_stock_peft(bases: dict[str, Base], make_rows, family: str) -> None:
    base = bases[family]
    rows = examples(base, make_rows(6))
    prompt = random_prompt(base, 5, seed=3)
    expected_loss, expected_slope = peft_loss_and_gradient(base, prompt, rows)
    loss, slope = packing.gradient(base, [prompt], [(0, row) for row in rows])
    assert loss.item() == pytest.approx(expected_loss, abs=1e-4)
    assert (slope - expected_slope).abs().max().item() < 1e-4
    assert expected_slope.abs().max().item() > 1e-3  # there was something to compare


@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_in_a_pack_has_the_loss_and_gradient_that_it_has_alone(
    bases: dict[str, Base], make_rows, family: str
) -> None:
    base = bases[family]
    sizes = [4, 9, 1]
    prompts = [random_prompt(base, size, seed) for seed, size in enumerate(sizes)]
    data = [examples(base, make_rows(count, first=count)) for count in (3, 1, 8)]
    together = [(i, row) for i, rows in enumerate(data) for row in rows]
    losses, slopes = packing.gradient(base, prompts, together)
    for prompt, rows, loss, slope in zip(prompts, data, losses, torch.split(slopes, sizes), strict=True):
        lone_loss, lone_slope = packing.gradient(base, [prompt], [(0, row) for row in rows])
        assert loss.item() == pytest.approx(lone_loss.item(), abs=1e-5)
        assert (slope - lone_slope).abs().max().item() < 1e-5


def test_a_prompt_that_is_not_finite_spoils_only_its_own_gradient(base: Base, make_rows) -> None:
    rows = examples(base, make_rows(4))
    good, bad = random_prompt(base, 4, 0), torch.full((4, base.hidden_size), torch.nan)
    for way in (base, fastest(base, pass_tokens=0)):
        losses, slopes = packing.gradient(way, [bad, good], [(i, row) for i in (0, 1) for row in rows])
        assert losses.isfinite().tolist() == [False, True]
        assert slopes.isfinite().all(dim=1).tolist() == [False] * 4 + [True] * 4


def test_the_base_gets_no_gradient(base: Base, make_rows) -> None:
    for way in (base, fastest(base, pass_tokens=0)):
        packing.gradient(way, [random_prompt(base, 4, 0)], [(0, row) for row in examples(base, make_rows(6))])
    assert all(not weight.requires_grad and weight.grad is None for weight in base.model.parameters())


def test_a_model_that_cannot_leave_logits_out_gives_the_same(base: Base, make_rows) -> None:
    plain = dataclasses.replace(base, accepts=frozenset())
    pack = collate([(0, row) for row in examples(base, make_rows(5))], [4], base.device)
    prompt = random_prompt(base, 4, 0)
    assert torch.allclose(plain_logits(base, prompt, pack), plain_logits(plain, prompt, pack), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_tokens", [packing.UNBOUNDED, 50])
def test_no_way_of_running_a_step_changes_what_comes_out(
    bases: dict[str, Base], make_rows, family: str, max_tokens: int
) -> None:
    plain = bases[family]
    quick = fastest(plain, pass_tokens=0)
    assert quick.ways.shared_prefix and quick.ways.bare_head
    sizes = [4, 9, 1]
    prompts = [random_prompt(plain, size, seed) for seed, size in enumerate(sizes)]
    long = Example(tuple(range(3, 33)), 4)
    without_input = [Example((5, 6, 2), 3), Example((7,), 1)]
    data = [examples(plain, make_rows(12)), without_input * 2, [*examples(plain, make_rows(8)), long]]
    rows = [(i, row) for i, each in enumerate(data) for row in each]
    how = packing.plan(quick, sizes, rows, max_tokens)
    assert how.shared and len(how.passes) > 1
    losses, slopes = packing.gradient(quick, prompts, rows, max_tokens)
    expected_losses, expected_slopes = packing.gradient(plain, prompts, rows)
    assert torch.allclose(losses, expected_losses, atol=1e-5)
    assert torch.allclose(slopes, expected_slopes, atol=1e-5 * expected_slopes.abs().max().item())
    tasks = list(zip(prompts, data, strict=True))
    for found, expected in zip(packing.score(quick, tasks, max_tokens), packing.score(plain, tasks), strict=True):
        assert found.loss == pytest.approx(expected.loss, abs=1e-5)
        assert found.accuracy == expected.accuracy


def test_sharing_a_prompt_is_for_packs_in_which_it_saves_tokens(base: Base, make_rows) -> None:
    quick = fastest(base, pass_tokens=0)
    rows = examples(base, make_rows(8))
    assert packing.plan(quick, [8], [(0, row) for row in rows]).shared
    assert not packing.plan(quick, [8] * 8, list(enumerate(rows))).shared  # one row each: nothing to share
    dear = fastest(base, pass_tokens=1e6)
    how = packing.plan(dear, [8], [(0, row) for row in rows])
    assert not how.shared and len(how.passes) == 1


def test_rows_beyond_a_sliding_window_are_not_shared(base: Base, make_rows) -> None:
    quick = dataclasses.replace(fastest(base, pass_tokens=0), window=10)
    short, long = [(0, Example((4, 5), 1))] * 8, [(0, Example((4,) * 9, 1))] * 8
    assert packing.plan(quick, [4], short).shared
    assert not packing.plan(quick, [4], [*short, *long]).shared


def test_scores_are_plain_means_over_target_tokens_and_rows(base: Base, make_rows) -> None:
    rows = examples(base, make_rows(7))
    prompt = random_prompt(base, 4, 0)
    total, right = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.tokens])
        inputs = torch.cat([prompt.unsqueeze(0), base.embed(ids)], dim=1)
        logits = base.model(inputs_embeds=inputs).logits[0, -row.targets - 1 : -1]
        wanted = torch.tensor(row.tokens[-row.targets :])
        total += functional.cross_entropy(logits, wanted, reduction="sum").item()
        right += bool((logits.argmax(1) == wanted).all())
    other = random_prompt(base, 2, 1)
    for bound in (16_384, 30):  # one pass, and many
        found = packing.score(base, [(other, rows[:2]), (prompt, rows)], bound)[1]
        assert found.loss == pytest.approx(total / sum(row.targets for row in rows), abs=1e-5)
        assert found.accuracy == right / len(rows)


def test_a_row_that_is_all_right_counts_in_the_accuracy(base: Base) -> None:
    prompt = random_prompt(base, 4, 0)
    inputs = torch.cat([prompt, base.embed(torch.tensor([5]))]).unsqueeze(0)
    told = int(base.model(inputs_embeds=inputs).logits[0, -1].argmax())
    right, wrong = Example((5, told), 1), Example((5, (told + 1) % 40), 1)
    assert packing.score(base, [(prompt, [right])])[0].accuracy == 1.0
    assert packing.score(base, [(prompt, [right, wrong])])[0].accuracy == 0.5


def test_a_base_in_half_precision_trains_prompts_in_full(base: Base, make_rows) -> None:
    half = dataclasses.replace(base, model=copy.deepcopy(base.model).bfloat16(), dtype=torch.bfloat16)
    rows = [(0, row) for row in examples(base, make_rows(6))]
    prompt = random_prompt(base, 4, 0)
    loss, slope = packing.gradient(half, [prompt], rows)
    full_loss, full_slope = packing.gradient(base, [prompt], rows)
    assert (loss.dtype, slope.dtype) == (torch.float32, torch.float32)
    assert loss.item() == pytest.approx(full_loss.item(), rel=0.02)
    assert functional.cosine_similarity(slope.flatten(), full_slope.flatten(), dim=0).item() > 0.98

"""The packed optimizer is AdamW for each request: plain, or with steps measured in the token's own size."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from broker.protocol.spec import RequestSpec
from broker.protocol.states import Rule, Schedule
from tuner.optimizer import PromptState, StepRule, update


def reference(prompt: torch.Tensor, slopes: list[torch.Tensor], rate: float) -> torch.Tensor:
    """The scaled rule written out with torch's own AdamW: its update at learning rate 1, scaled token by token."""
    prompt = prompt.clone()
    shadow = torch.nn.Parameter(torch.zeros_like(prompt))
    adam = torch.optim.AdamW([shadow], lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step, slope in enumerate(slopes, 1):
        before = shadow.detach().clone()
        shadow.grad = slope.clone()
        adam.step()
        moved = shadow.detach() - before
        prompt += moved * rate * min(1.0, step / 10) * prompt.pow(2).mean(1, keepdim=True).sqrt()
    return prompt


def torchs_own(prompt: torch.Tensor, slopes: list[torch.Tensor], rule: StepRule) -> torch.Tensor:
    """AdamW, gradient clipping and schedules as torch and transformers have them."""
    weight = torch.nn.Parameter(prompt.clone())
    adam = torch.optim.AdamW([weight], lr=rule.rate, weight_decay=rule.weight_decay)
    if rule.schedule is Schedule.CONSTANT:
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda _: 1.0)
    else:
        make = {Schedule.LINEAR: get_linear_schedule_with_warmup, Schedule.COSINE: get_cosine_schedule_with_warmup}
        schedule = make[rule.schedule](adam, rule.warmup_steps, rule.steps)
    for slope in slopes:
        weight.grad = slope.clone()
        if rule.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([weight], rule.clip_norm)
        adam.step()
        schedule.step()
    return weight.detach()


def test_each_request_moves_as_the_rule_says_whatever_shares_its_step() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(4, 8), 3 * torch.randn(2, 8)
    slopes = [torch.randn(4, 8) for _ in range(20)], [torch.randn(2, 8) for _ in range(15)]
    states = [PromptState.new(first), PromptState.new(second)]
    for step in range(20):
        if step < 5:  # the second joins five steps later
            update(states[:1], [StepRule(0.3)], slopes[0][step], 1.0)
        else:
            update(states, [StepRule(0.3), StepRule(0.05)], torch.cat([slopes[0][step], slopes[1][step - 5]]), 1.0)
    assert [state.step for state in states] == [20, 15]
    assert torch.allclose(states[0].prompt, reference(first, slopes[0], 0.3), atol=1e-5)
    assert torch.allclose(states[1].prompt, reference(second, slopes[1], 0.05), atol=1e-5)


def test_the_plain_rule_is_torchs_own_adamw_for_each_request_of_a_pack() -> None:
    torch.manual_seed(0)
    plain = {"scaled": False, "warmup_steps": 0, "steps": 25}
    rules = [
        StepRule(0.01, **plain),
        StepRule(0.3, weight_decay=0.1, **plain),
        StepRule(0.05, clip_norm=0.5, schedule=Schedule.LINEAR, **plain),
        StepRule(0.05, weight_decay=0.01, clip_norm=100.0, schedule=Schedule.COSINE, **plain),
        StepRule(0.3),
    ]
    prompts = [torch.randn(size, 8) for size in (3, 1, 4, 2, 5)]
    slopes = [[torch.randn_like(prompt) for _ in range(25)] for prompt in prompts]
    states = [PromptState.new(prompt) for prompt in prompts]
    for step in range(25):
        update(states, rules, torch.cat([each[step] for each in slopes]), 1.0)
    for state, prompt, each, rule in zip(states[:4], prompts, slopes, rules, strict=False):
        assert torch.allclose(state.prompt, torchs_own(prompt, each, rule), atol=1e-6)
    assert torch.allclose(states[4].prompt, reference(prompts[4], slopes[4], 0.3), atol=1e-5)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_the_rate_warms_up_then_follows_its_schedule_to_the_last_step(schedule: Schedule) -> None:
    rule = StepRule(2.0, warmup_steps=4, steps=12, schedule=schedule)
    rates = [rule.rate_at(step) for step in range(1, 13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    if schedule is Schedule.CONSTANT:
        assert set(rates[4:]) == {2.0}
    else:
        assert rates[4:] == sorted(rates[4:], reverse=True)
        assert rates[8] == pytest.approx(1.0)  # half-way through what follows the warm-up
        assert 0 < rates[-1] < 0.3
        assert rule.rate_at(13) == pytest.approx(0.0)


def test_a_request_without_wishes_gets_the_default_rule_and_adamw_no_warm_up() -> None:
    spec = RequestSpec(model="m", train="0" * 64)
    assert StepRule.of(spec, 7) == StepRule(0.3, steps=7)
    plain = RequestSpec(model="m", train="0" * 64, rule=Rule.ADAMW, rate=0.03)
    assert StepRule.of(plain, 7) == StepRule(0.03, scaled=False, warmup_steps=0, steps=7)


def test_a_gradient_that_is_not_finite_spoils_only_its_own_request() -> None:
    states = [PromptState.new(torch.ones(2, 8)), PromptState.new(torch.ones(1, 8))]
    slope = torch.ones(3, 8)
    slope[2] = math.inf
    update(states, [StepRule(0.3, clip_norm=1.0)] * 2, slope, 1.0)
    assert states[0].prompt.isfinite().all()
    assert not states[1].prompt.isfinite().all()


def test_a_token_of_zeros_can_move() -> None:
    state = PromptState.new(torch.zeros(1, 8))
    update([state], [StepRule(0.3)], torch.ones(1, 8), 1.0)
    assert (state.prompt < 0).all()


def test_the_prompt_that_was_handed_out_is_never_changed() -> None:
    state = PromptState.new(torch.ones(1, 8))
    handed_out = state.prompt
    update([state], [StepRule(0.3)], torch.ones(1, 8), 1.0)
    assert torch.equal(handed_out, torch.ones(1, 8))

"""The packed optimizer is AdamW for each request, with steps measured in the token's own size."""

from __future__ import annotations

import torch

from tuner.optimizer import PromptState, update


def reference(prompt: torch.Tensor, slopes: list[torch.Tensor], rate: float) -> torch.Tensor:
    """The rule written out with torch's own AdamW: its update at learning rate 1, scaled token by token."""
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


def test_each_request_moves_as_the_rule_says_whatever_shares_its_step() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(4, 8), 3 * torch.randn(2, 8)
    slopes = [torch.randn(4, 8) for _ in range(20)], [torch.randn(2, 8) for _ in range(15)]
    states = [PromptState.new(first), PromptState.new(second)]
    for step in range(20):
        if step < 5:  # the second joins five steps later
            update(states[:1], [0.3], slopes[0][step], 1.0)
        else:
            update(states, [0.3, 0.05], torch.cat([slopes[0][step], slopes[1][step - 5]]), 1.0)
    assert [state.step for state in states] == [20, 15]
    assert torch.allclose(states[0].prompt, reference(first, slopes[0], 0.3), atol=1e-5)
    assert torch.allclose(states[1].prompt, reference(second, slopes[1], 0.05), atol=1e-5)


def test_a_token_of_zeros_can_move() -> None:
    state = PromptState.new(torch.zeros(1, 8))
    update([state], [0.3], torch.ones(1, 8), 1.0)
    assert (state.prompt < 0).all()


def test_the_prompt_that_was_handed_out_is_never_changed() -> None:
    state = PromptState.new(torch.ones(1, 8))
    handed_out = state.prompt
    update([state], [0.3], torch.ones(1, 8), 1.0)
    assert torch.equal(handed_out, torch.ones(1, 8))

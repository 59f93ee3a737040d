"""AdamW over the prompts of all running requests at once.

The update of each virtual token is scaled by `rate` times that token's own root mean square, so that one rate serves
every base model: it is the share of its size by which a token moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
_WARM_UP_STEPS = 10
_FLOOR = 1e-3  # of the base's embedding size: a token of zeros must be able to move


@dataclass(slots=True)
class PromptState:
    """One request's prompt and its optimizer's moments, each [virtual tokens, hidden size] in float32, after `step`
    updates."""

    prompt: Tensor
    m: Tensor
    v: Tensor
    step: int = 0

    @classmethod
    def new(cls, prompt: Tensor) -> PromptState:
        return cls(prompt=prompt.clone(), m=torch.zeros_like(prompt), v=torch.zeros_like(prompt))

    def write(self, prompt: Tensor, m: Tensor, v: Tensor) -> None:
        """Takes the state after one more update."""
        self.prompt, self.m, self.v = prompt, m, v
        self.step += 1


@torch.no_grad()
def update(states: list[PromptState], rates: list[float], slope: Tensor, embedding_rms: float) -> None:
    """One AdamW step (weight decay 0, linear warm-up, then constant) of every state; `slope` is the gradient of the
    states' prompts, one below the other. Each state gets what it would get alone."""
    lengths = [len(state.prompt) for state in states]
    prompt = torch.cat([state.prompt for state in states])
    m = torch.cat([state.m for state in states]).lerp_(slope, 1 - _BETA1)
    v = torch.cat([state.v for state in states]).mul_(_BETA2).addcmul_(slope, slope, value=1 - _BETA2)
    m_scale, v_scale = _factors(states, rates, lengths, slope.device)
    size = prompt.pow(2).mean(dim=1, keepdim=True).sqrt_().clamp_(min=_FLOOR * embedding_rms)
    prompt.sub_((m * m_scale * size).div_((v * v_scale).sqrt_().add_(_EPSILON)))
    parts = zip(*(torch.split(tensor, lengths) for tensor in (prompt, m, v)), strict=True)
    for state, (new_prompt, new_m, new_v) in zip(states, parts, strict=True):
        state.write(new_prompt, new_m, new_v)


def _factors(
    states: list[PromptState], rates: list[float], lengths: list[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """For each virtual token: rate, warm-up and bias correction of the first moment; bias correction of the second."""
    first, second = [], []
    for state, rate, length in zip(states, rates, lengths, strict=True):
        step = state.step + 1
        first += [rate * min(1.0, step / _WARM_UP_STEPS) / (1 - _BETA1**step)] * length
        second += [1 / (1 - _BETA2**step)] * length
    return torch.tensor(first, device=device).unsqueeze(1), torch.tensor(second, device=device).unsqueeze(1)

"""AdamW over the prompts of all running requests at once, each by its own rule.

By the default rule the update of each virtual token is scaled by `rate` times that token's own root mean square, so
that one rate serves every base model: it is the share of its size by which a token moves. The other rule is plain
AdamW, as torch has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from broker.protocol.spec import RequestSpec
from broker.protocol.states import Rule, Schedule

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
_WARM_UP_STEPS = {Rule.SCALED: 10, Rule.ADAMW: 0}
_FLOOR = 1e-3  # of the base's embedding size: a token of zeros must be able to move
_CLIP_EPSILON = 1e-6  # torch's own, in clip_grad_norm_


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


@dataclass(frozen=True, slots=True)
class StepRule:
    """How a request's prompt moves. The schedule ends after `steps` updates."""

    rate: float
    scaled: bool = True
    weight_decay: float = 0.0
    clip_norm: float | None = None
    schedule: Schedule = Schedule.CONSTANT
    warmup_steps: int = _WARM_UP_STEPS[Rule.SCALED]
    steps: int = 1

    @classmethod
    def of(cls, spec: RequestSpec, steps: int) -> StepRule:
        """The rule that a request asks for."""
        return cls(
            rate=spec.rate,
            scaled=spec.rule is Rule.SCALED,
            weight_decay=spec.weight_decay,
            clip_norm=spec.clip_norm,
            schedule=spec.schedule,
            warmup_steps=_WARM_UP_STEPS[spec.rule] if spec.warmup_steps is None else spec.warmup_steps,
            steps=steps,
        )

    def rate_at(self, step: int) -> float:
        """The rate of one update, counted from 1: linear through the warm-up, then by the schedule, which reaches 0
        only behind the last update."""
        if step <= self.warmup_steps:
            return self.rate * step / self.warmup_steps
        done = (step - 1 - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        match self.schedule:
            case Schedule.LINEAR:
                return self.rate * max(0.0, 1 - done)
            case Schedule.COSINE:
                return self.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            case Schedule.CONSTANT:
                return self.rate


@torch.no_grad()
def update(states: Sequence[PromptState], rules: Sequence[StepRule], slope: Tensor, embedding_rms: float) -> None:
    """One AdamW step of every state by its rule; `slope` is the gradient of the states' prompts, one below the other.
    Each state gets what it would get alone."""
    lengths = [len(state.prompt) for state in states]
    slope = _clipped(slope, rules, lengths)
    prompt = torch.cat([state.prompt for state in states])
    m = torch.cat([state.m for state in states]).lerp_(slope, 1 - _BETA1)
    v = torch.cat([state.v for state in states]).mul_(_BETA2).addcmul_(slope, slope, value=1 - _BETA2)
    m_scale, v_root, decay, scaled = _factors(states, rules, lengths, slope.device)
    if scaled is not None:
        size = prompt.pow(2).mean(dim=1, keepdim=True).sqrt_().clamp_(min=_FLOOR * embedding_rms)
        m_scale = m_scale * torch.where(scaled > 0, size, 1.0)
    prompt.mul_(decay).sub_(m.mul(m_scale).div_(v.sqrt().div_(v_root).add_(_EPSILON)))
    parts = zip(*(torch.split(tensor, lengths) for tensor in (prompt, m, v)), strict=True)
    for state, (new_prompt, new_m, new_v) in zip(states, parts, strict=True):
        state.write(new_prompt, new_m, new_v)


def _clipped(slope: Tensor, rules: Sequence[StepRule], lengths: list[int]) -> Tensor:
    """Each state's gradient with at most its rule's norm."""
    if all(rule.clip_norm is None for rule in rules):
        return slope
    squares = torch.stack([part.pow(2).sum() for part in torch.split(slope, lengths)])
    most = torch.tensor([math.inf if rule.clip_norm is None else rule.clip_norm for rule in rules], device=slope.device)
    share = (most / (squares.sqrt() + _CLIP_EPSILON)).clamp_(max=1.0)
    return slope * share.repeat_interleave(torch.tensor(lengths, device=slope.device)).unsqueeze(1)


def _factors(
    states: Sequence[PromptState], rules: Sequence[StepRule], lengths: list[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """For each virtual token, as columns: rate and bias correction of the first moment; the root of the second one's;
    what weight decay leaves; and whether its update is scaled (None: no token's is)."""
    columns: list[list[float]] = []
    for state, rule, length in zip(states, rules, lengths, strict=True):
        step = state.step + 1
        rate = rule.rate_at(step)
        bias, root = 1 - _BETA1**step, math.sqrt(1 - _BETA2**step)
        columns += [[rate / bias, root, 1 - rate * rule.weight_decay, float(rule.scaled)]] * length
    m_scale, v_root, decay, scaled = torch.tensor(columns, device=device).unsqueeze(2).unbind(1)
    return m_scale, v_root, decay, scaled if any(rule.scaled for rule in rules) else None

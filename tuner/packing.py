"""Several requests in one training step: each row is [its request's virtual tokens][its own tokens].

Rows do not see each other, so that a request's loss and gradient are what it would have alone. A step runs in as many
forward and backward passes as its rows' lengths and the memory ask for; what comes out is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tuner.batches import batches, padded_tokens
from tuner.data import Example
from tuner.forward import Pack, collate, plain_logits, prefix_of, text_logits
from tuner.model import Base

SCORED_TOKENS = 16_384  # in one forward pass without gradients: bounds its memory, whatever the number of rows
UNBOUNDED = 1 << 62

PackRow = tuple[int, Example]  # which of the pack's prompts, and the row


@dataclass(frozen=True, slots=True)
class Score:
    """One prompt on its rows: mean loss of a target token, and the shares of rows with every target token right and of
    target tokens that are right."""

    loss: float
    accuracy: float
    token_accuracy: float = 0.0


@dataclass(frozen=True, slots=True)
class Judged:
    """One prompt on each of its rows."""

    loss: NDArray[np.float64]  # the sum over the row's target tokens
    wrong: NDArray[np.float64]  # how many of them are not the likeliest


@dataclass(frozen=True, slots=True)
class Plan:
    """How a step's rows meet the model."""

    shared: bool  # each prompt is computed once, ahead of its rows
    passes: list[NDArray[np.int64]]  # the row numbers of each
    tokens: int  # all that is computed, virtual tokens and padding included
    splittable: int  # the tokens of the largest pass of several rows, or of several prompts; 0 if there is none


def plan(base: Base, lengths: Sequence[int], rows: Sequence[PackRow], max_tokens: int = UNBOUNDED) -> Plan:
    """The cheaper of the ways that `base` allows, by the tokens computed; `lengths` are the prompts' numbers of virtual
    tokens. A pass has at most `max_tokens`, unless it is a single row."""
    virtual = np.array(lengths)[[prompt for prompt, _ in rows]]
    text = np.array([len(example) for _, example in rows])
    ways = base.ways
    cut = batches(virtual + text, ways.pass_tokens, max_tokens)
    plain = Plan(False, cut, padded_tokens(virtual + text, cut), _splittable(virtual + text, cut))
    longest = max(lengths)
    # A prompt shorter than the longest is filled up behind its end: a layer that counts back a window's length of
    # places would then count the filling too.
    beyond = base.window is not None and longest + int(text.max()) > base.window
    if not ways.shared_prefix or beyond or len(lengths) * longest > max_tokens:
        return plain
    cut = batches(text, ways.pass_tokens, max_tokens)
    prefix = len(lengths) * longest
    splittable = max(prefix if len(lengths) > 1 else 0, _splittable(text, cut))
    shared = Plan(True, cut, prefix + padded_tokens(text, cut), splittable)
    dearer = (len(shared.passes) + 1 - len(plain.passes)) * ways.pass_tokens
    return shared if shared.tokens + dearer < plain.tokens else plain


def _splittable(lengths: NDArray[np.int64], cut: list[NDArray[np.int64]]) -> int:
    return max((padded_tokens(lengths, [rows]) for rows in cut if len(rows) > 1), default=0)


def gradient(
    base: Base, prompts: Sequence[Tensor], rows: Sequence[PackRow], max_tokens: int = UNBOUNDED
) -> tuple[Tensor, Tensor]:
    """Each prompt's mean loss over the target tokens of its rows, and the gradient of its own loss with respect to its
    virtual tokens, one prompt below the other. A loss that is not finite spoils only its own prompt's gradient."""
    lengths = [len(prompt) for prompt in prompts]
    leaf = torch.cat(list(prompts)).detach().requires_grad_(True)
    targets = _targets(rows, len(lengths)).to(base.device)
    loss = torch.zeros(len(lengths), device=base.device)

    def learn(logits: Tensor, pack: Pack) -> None:
        each = functional.cross_entropy(logits, pack.label_id, reduction="none") / targets[pack.label_prompt]
        # The sum's gradient is each prompt's own: no row of another takes part in a loss.
        each.sum().backward()  # type: ignore[no-untyped-call]
        loss.index_add_(0, pack.label_prompt, each.detach())

    how = plan(base, lengths, rows, max_tokens)
    if how.shared:
        prefix = prefix_of(base, leaf, lengths, _without_input(rows))
        for pack in _packs(base, lengths, rows, how):
            learn(text_logits(base, prefix, pack), pack)
        prefix.backward()
    else:
        for pack in _packs(base, lengths, rows, how):
            learn(plain_logits(base, leaf, pack), pack)
    assert leaf.grad is not None
    return loss, leaf.grad


def score(
    base: Base, tasks: Sequence[tuple[Tensor, Sequence[Example]]], max_tokens: int = SCORED_TOKENS
) -> list[Score]:
    """Scores each prompt on its rows, many of them in one forward pass."""
    found = []
    for judged, (_, examples) in zip(judge(base, tasks, max_tokens), tasks, strict=True):
        targets = sum(example.targets for example in examples)
        exact = float((judged.wrong == 0).mean())
        found.append(Score(float(judged.loss.sum()) / targets, exact, 1 - float(judged.wrong.sum()) / targets))
    return found


@torch.no_grad()
def judge(
    base: Base, tasks: Sequence[tuple[Tensor, Sequence[Example]]], max_tokens: int = SCORED_TOKENS
) -> list[Judged]:
    """What each prompt makes of each of its rows, many of them in one forward pass."""
    lengths = [len(prompt) for prompt, _ in tasks]
    matrix = torch.cat([prompt for prompt, _ in tasks])
    rows = [(task, example) for task, (_, examples) in enumerate(tasks) for example in examples]
    how = plan(base, lengths, rows, min(max_tokens, SCORED_TOKENS))
    logits_of: Callable[[Pack], Tensor] = partial(plain_logits, base, matrix)
    if how.shared:
        logits_of = partial(text_logits, base, prefix_of(base, matrix, lengths, _without_input(rows)))
    found = np.zeros((2, len(rows)))
    for numbers, pack in zip(how.passes, _packs(base, lengths, rows, how), strict=True):
        found[:, numbers] = _judge(logits_of(pack), pack)
    ends = np.cumsum([len(examples) for _, examples in tasks])[:-1]
    return [Judged(loss, wrong) for loss, wrong in zip(*(np.split(each, ends) for each in found), strict=True)]


def _judge(logits: Tensor, pack: Pack) -> NDArray[np.float64]:
    """Of each row: the sum of its target tokens' losses, and how many of them are not the likeliest."""
    each = functional.cross_entropy(logits, pack.label_id, reduction="none").double()
    wrong = (logits.argmax(dim=1) != pack.label_id).double()
    found = torch.zeros(2, len(pack.ids), device=each.device, dtype=each.dtype)
    judged: NDArray[np.float64] = found.index_add_(1, pack.label_row, torch.stack([each, wrong])).cpu().numpy()
    return judged


def _packs(base: Base, lengths: Sequence[int], rows: Sequence[PackRow], how: Plan) -> Iterator[Pack]:
    for numbers in how.passes:
        yield collate([rows[row] for row in numbers.tolist()], lengths, base.device, with_prompts=not how.shared)


def _targets(rows: Sequence[PackRow], prompts: int) -> Tensor:
    owners = [prompt for prompt, _ in rows]
    return torch.from_numpy(np.bincount(owners, [example.targets for _, example in rows], minlength=prompts)).float()


def _without_input(rows: Sequence[PackRow]) -> list[int]:
    """The prompts whose last virtual token predicts the first target token of a row: that row has no input."""
    return sorted({prompt for prompt, example in rows if example.targets == len(example)})

"""Several requests in one forward and backward pass.

Each row is [its request's virtual tokens][its own tokens], padded on the right. Rows do not see each other, so that a
request's loss and gradient are what it would have alone. `target_logits` is the one place that knows how rows meet the
model: sharing a prompt's keys and values between its rows, or sorting rows by length, changes nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tuner.data import Example
from tuner.model import Base

_SCORED_TOKENS = 16_384  # in one forward pass without gradients: bounds its memory, whatever the number of rows

PackRow = tuple[int, Example]  # which of the pack's prompts, and the row


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows as tensors on the model's device. Prompts are the rows of one matrix, each prompt a run of them."""

    ids: Tensor  # [rows, length]; 0 where virtual tokens and padding stand
    mask: Tensor  # [rows, length]
    virtual_row: Tensor  # where each virtual token goes, and which row of the prompt matrix it is
    virtual_place: Tensor
    virtual_source: Tensor
    label_row: Tensor  # of each target token: its row,
    label_place: Tensor  # the place whose logits predict it, as an index into `kept`,
    label_id: Tensor  # the token,
    label_prompt: Tensor  # and whose loss it counts in
    kept: Tensor  # the places that predict a target token in any row
    targets: Tensor  # [prompts]: how many target tokens each has


@dataclass(frozen=True, slots=True)
class Score:
    """One prompt on its rows: mean loss of a target token, and the share of rows with every target token right."""

    loss: float
    accuracy: float


def collate(rows: Sequence[PackRow], lengths: Sequence[int], device: torch.device) -> Pack:
    """Packs rows; `lengths` are the prompts' numbers of virtual tokens."""
    examples = [example for _, example in rows]
    owner = np.array([prompt for prompt, _ in rows])
    virtual = np.array(lengths)[owner]
    ends = virtual + np.array([len(example) for example in examples])
    ids = np.zeros((len(rows), int(ends.max())), dtype=np.int64)
    for row, example in enumerate(examples):
        ids[row, virtual[row] : ends[row]] = example.tokens
    virtual_row, virtual_place = _spans(np.zeros_like(virtual), virtual)
    targets = np.array([example.targets for example in examples])
    label_row, label_place = _spans(ends - targets, targets)
    kept, kept_index = np.unique(label_place - 1, return_inverse=True)

    def to_device(array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Pack(
        ids=to_device(ids),
        mask=to_device((np.arange(ids.shape[1]) < ends[:, None]).astype(np.int64)),
        virtual_row=to_device(virtual_row),
        virtual_place=to_device(virtual_place),
        virtual_source=to_device((np.cumsum(lengths) - lengths)[owner[virtual_row]] + virtual_place),
        label_row=to_device(label_row),
        label_place=to_device(kept_index),
        label_id=to_device(ids[label_row, label_place]),
        label_prompt=to_device(owner[label_row]),
        kept=to_device(kept),
        targets=to_device(np.bincount(owner, targets, minlength=len(lengths)).astype(np.int64)),
    )


def _spans(first: NDArray[np.int64], count: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each row the places `first`, `first` + 1, ... , `count` of them: all rows' numbers, and the places."""
    row = np.repeat(np.arange(len(count)), count)
    place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    return row, place


def target_logits(base: Base, prompts: Tensor, pack: Pack) -> Tensor:
    """The logits that predict each target token, [targets, vocabulary] in float32, differentiable in `prompts`: the
    prompt matrix [all virtual tokens, hidden size] in float32."""
    # Autograd's graph begins at the prompts: neither the embeddings nor the weights take part in it.
    embedded = base.embed(pack.ids).detach()
    virtual = prompts.index_select(0, pack.virtual_source).to(embedded.dtype)
    rows = embedded.index_put((pack.virtual_row, pack.virtual_place), virtual)
    options: dict[str, object] = {"use_cache": False}
    if "position_ids" in base.accepts:
        options["position_ids"] = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[0], -1)
    sliced = "logits_to_keep" in base.accepts
    if sliced:
        options["logits_to_keep"] = pack.kept
    logits: Tensor = base.model(inputs_embeds=rows, attention_mask=pack.mask, **options).logits
    place = pack.label_place if sliced else pack.kept[pack.label_place]
    return logits[pack.label_row, place].float()


def losses(logits: Tensor, pack: Pack) -> Tensor:
    """Each prompt's mean loss over its target tokens, [prompts]."""
    each = functional.cross_entropy(logits, pack.label_id, reduction="none")
    total = torch.zeros(len(pack.targets), device=each.device).index_add(0, pack.label_prompt, each)
    return total / pack.targets


def gradient(base: Base, prompts: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
    """Each prompt's mean loss, and the gradient of its own loss with respect to its virtual tokens. A loss that is not
    finite spoils only its own prompt's gradient."""
    leaf = prompts.detach().requires_grad_(True)
    loss = losses(target_logits(base, leaf, pack), pack)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), slope


@torch.no_grad()
def score(base: Base, tasks: Sequence[tuple[Tensor, Sequence[Example]]]) -> list[Score]:
    """Scores each prompt on its rows, many of them in one forward pass."""
    prompts = [prompt for prompt, _ in tasks]
    matrix, lengths = torch.cat(prompts), [len(prompt) for prompt in prompts]
    rows = [(task, example) for task, (_, examples) in enumerate(tasks) for example in examples]
    loss, right = np.zeros(len(tasks)), np.zeros(len(tasks))
    for chunk in _chunks(rows, lengths):
        pack = collate(chunk, lengths, base.device)
        logits = target_logits(base, matrix, pack)
        each = functional.cross_entropy(logits, pack.label_id, reduction="none").double()
        wrong = logits.argmax(dim=1) != pack.label_id
        row_loss = torch.zeros(len(chunk), device=base.device, dtype=each.dtype).index_add(0, pack.label_row, each)
        row_wrong = torch.zeros(len(chunk), device=base.device).index_add(0, pack.label_row, wrong.float())
        owners = [task for task, _ in chunk]
        np.add.at(loss, owners, row_loss.cpu().numpy())
        np.add.at(right, owners, (row_wrong == 0).cpu().numpy())
    targets = [sum(example.targets for example in examples) for _, examples in tasks]
    return [
        Score(loss=float(loss[task]) / targets[task], accuracy=float(right[task]) / len(examples))
        for task, (_, examples) in enumerate(tasks)
    ]


def _chunks(rows: list[PackRow], lengths: Sequence[int]) -> list[list[PackRow]]:
    """Cuts `rows`, in their order, so that a chunk stays within the token bound when padded."""
    chunks: list[list[PackRow]] = []
    width = 0
    for row in rows:
        length = lengths[row[0]] + len(row[1])
        if not chunks or max(width, length) * (len(chunks[-1]) + 1) > _SCORED_TOKENS:
            chunks.append([])
            width = 0
        width = max(width, length)
        chunks[-1].append(row)
    return chunks

"""Two ways of a pack's rows through the model, with the same logits.

The plain way, the reference: each row is its prompt's virtual tokens, then its own tokens. The shared way: each prompt
goes through the backbone once, and its keys and values are handed to all its rows, of which only the text runs. Causal
attention makes that exact: nothing in a row changes what its virtual tokens see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tuner.model import Base

if TYPE_CHECKING:
    from tuner.data import Example


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows of one forward pass as tensors on the model's device, padded on the right. With their prompts, a row's
    places count from its first virtual token; without, from its first text token, and the last virtual token is -1."""

    owners: NDArray[np.int64]  # whose prompt each row has
    owner: Tensor
    virtual: Tensor  # [rows]: how many virtual tokens
    ids: Tensor  # [rows, places]; 0 where virtual tokens and padding stand
    mask: Tensor | None  # [rows, places]; None without padding
    virtual_row: Tensor  # where each virtual token goes, and which row of the prompt matrix it is; empty without
    virtual_place: Tensor
    virtual_source: Tensor
    label_row: Tensor  # of each target token: its row,
    label_place: Tensor  # the place whose logits predict it,
    label_id: Tensor  # the token,
    label_prompt: Tensor  # and whose loss it counts in; those of place -1 come last
    bare: int  # how many of these there are


@dataclass(slots=True)
class Prefix:
    """What the rows of a pack need of their prompts, computed once; gradients gather here until `backward`."""

    lengths: Tensor  # [prompts]
    longest: int
    even: bool  # all prompts have the same length
    held: list[tuple[Tensor, Tensor]]  # keys and values of each layer, [prompts, heads, longest, ...]
    last: Tensor  # the logits behind the last virtual token,
    last_row: Tensor  # and which row of `last` each prompt has
    computed: list[Tensor]  # what `held` and `last` were cut off from

    def backward(self) -> None:
        """Takes what the rows' gradients say of the prefix back to the prompts."""
        cut = [tensor for pair in self.held for tensor in pair] + [self.last]
        pairs = [(whole, part.grad) for whole, part in zip(self.computed, cut, strict=True) if part.grad is not None]
        torch.autograd.backward([whole for whole, _ in pairs], [grad for _, grad in pairs])


def collate(
    rows: Sequence[tuple[int, Example]], lengths: Sequence[int], device: torch.device, *, with_prompts: bool = True
) -> Pack:
    """Packs (prompt, row) pairs; `lengths` are the prompts' numbers of virtual tokens."""
    examples = [example for _, example in rows]
    owner = np.array([prompt for prompt, _ in rows])
    virtual = np.array(lengths)[owner]
    first = virtual if with_prompts else np.zeros_like(virtual)
    ends = first + np.array([len(example) for example in examples])
    ids = np.zeros((len(rows), int(ends.max())), dtype=np.int64)
    for row, example in enumerate(examples):
        ids[row, first[row] : ends[row]] = example.tokens
    virtual_row, virtual_place = _spans(np.zeros_like(first), first)
    targets = np.array([example.targets for example in examples])
    label_row, target_place = _spans(ends - targets, targets)
    order = np.argsort(target_place == 0, kind="stable")
    label_row, target_place = label_row[order], target_place[order]

    def to_device(array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Pack(
        owners=owner,
        owner=to_device(owner),
        virtual=to_device(virtual),
        ids=to_device(ids),
        mask=None if (ends == ids.shape[1]).all() else to_device((np.arange(ids.shape[1]) < ends[:, None]).astype(int)),
        virtual_row=to_device(virtual_row),
        virtual_place=to_device(virtual_place),
        virtual_source=to_device((np.cumsum(lengths) - lengths)[owner[virtual_row]] + virtual_place),
        label_row=to_device(label_row),
        label_place=to_device(target_place - 1),
        label_id=to_device(ids[label_row, target_place]),
        label_prompt=to_device(owner[label_row]),
        bare=int((target_place == 0).sum()),
    )


def plain_logits(base: Base, prompts: Tensor, pack: Pack) -> Tensor:
    """The logits that predict each target token, [targets, vocabulary] in float32, differentiable in `prompts`: the
    prompt matrix [all virtual tokens, hidden size] in float32."""
    # Autograd's graph begins at the prompts: neither the embeddings nor the weights take part in it.
    embedded = base.embed(pack.ids).detach()
    virtual = prompts.index_select(0, pack.virtual_source).to(embedded.dtype)
    rows = embedded.index_put((pack.virtual_row, pack.virtual_place), virtual)
    options: dict[str, Any] = {"use_cache": False}
    if pack.mask is not None:
        options["attention_mask"] = pack.mask
        if "position_ids" in base.accepts:
            options["position_ids"] = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[0], -1)
    return _logits(base, rows, (pack.label_row, pack.label_place), options)


def prefix_of(base: Base, prompts: Tensor, lengths: Sequence[int], needed: Sequence[int]) -> Prefix:
    """The prompts' keys and values. `needed` are the prompts whose last logits some row asks for."""
    from transformers import DynamicCache

    # Filled up behind the end, where no virtual token looks: no mask is needed.
    filled = pad_sequence(list(torch.split(prompts, list(lengths))), batch_first=True).to(base.dtype)
    cache = DynamicCache()
    rows = torch.tensor(needed, dtype=torch.long, device=base.device)
    size = torch.tensor(lengths, device=base.device)
    places = (rows, size[rows] - 1)
    last = _logits(base, filled, places, {"use_cache": True, "past_key_values": cache})
    layers: Any = cache.layers  # a layer of another kind has neither keys nor values: then the model is not for this
    computed: list[Tensor] = [tensor for layer in layers for tensor in (layer.keys, layer.values)] + [last]
    cut = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in computed]
    last_row = torch.zeros(len(lengths), dtype=torch.long, device=base.device)
    last_row[rows] = torch.arange(len(needed), device=base.device)
    return Prefix(
        lengths=size,
        longest=max(lengths),
        even=len(set(lengths)) == 1,
        held=list(zip(cut[:-1:2], cut[1:-1:2], strict=True)),
        last=cut[-1],
        last_row=last_row,
        computed=computed,
    )


def text_logits(base: Base, prefix: Prefix, pack: Pack) -> Tensor:
    """As `plain_logits`, of a pack without its prompts."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix.held):
        cache.update(keys.index_select(0, pack.owner), values.index_select(0, pack.owner), layer)
    options: dict[str, Any] = {"use_cache": True, "past_key_values": cache}
    if pack.mask is not None or not prefix.even:
        width = pack.ids.shape[1]
        place = torch.arange(max(prefix.longest, width), device=base.device)
        text = torch.ones_like(pack.ids) if pack.mask is None else pack.mask
        before = (place[: prefix.longest] < pack.virtual.unsqueeze(1)).to(text.dtype)
        options["attention_mask"] = torch.cat([before, text], dim=1)
        # Padding has a position that the model knows, too.
        options["position_ids"] = (pack.virtual.unsqueeze(1) + place[:width]) * text
    inside = len(pack.label_id) - pack.bare
    places = (pack.label_row[:inside], pack.label_place[:inside])
    logits = _logits(base, base.embed(pack.ids).detach(), places, options)
    if not pack.bare:
        return logits
    return torch.cat([logits, prefix.last.index_select(0, prefix.last_row[pack.label_prompt[inside:]])])


def _logits(base: Base, rows: Tensor, places: tuple[Tensor, Tensor], options: dict[str, Any]) -> Tensor:
    """The logits at (row, place) pairs, in float32."""
    row, place = places
    if base.ways.bare_head:
        backbone = getattr(base.model, base.model.base_model_prefix)
        hidden = backbone(inputs_embeds=rows, **options).last_hidden_state
        chosen: Tensor = base.model.get_output_embeddings()(hidden[row, place])
        return chosen.float()
    if "logits_to_keep" in base.accepts:
        kept, place = torch.unique(place, return_inverse=True)
        options = {**options, "logits_to_keep": kept if len(kept) else 1}
    logits: Tensor = base.model(inputs_embeds=rows, **options).logits
    return logits[row, place].float()


def _spans(first: NDArray[np.int64], count: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each row the places `first`, `first` + 1, ... , `count` of them: all rows' numbers, and the places."""
    row = np.repeat(np.arange(len(count)), count)
    place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    return row, place

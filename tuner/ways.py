"""Finds out which shortcuts a base model allows, by trying each against the plain way on a few made-up rows."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from tuner.data import Example
from tuner.forward import collate, plain_logits, prefix_of, text_logits
from tuner.model import Base, Ways
from tuner.reading import recall, remember

_log = logging.getLogger(__name__)

_TRIAL = 1  # raised when what is tried changes
_LENGTHS = [5, 3]
_ROWS = [(0, 4, 2), (1, 7, 3), (1, 1, 1), (0, 6, 1)]  # prompt, tokens, targets: the third has no input
# What starting a pass through one layer costs, as the arithmetic that could have been done meanwhile: measured on the
# CPU, on a GPU taken from the usual time of its launches. Fixed, so that every worker packs the same rows the same way.
_PASS_FLOPS_A_LAYER = {"cpu": 1e8, "cuda": 1.6e11}
_TOLERANCE = {torch.float32: 1e-4}  # of the largest value; rounding alone stays below a hundredth of it
_LOW_PRECISION_TOLERANCE = 0.05


def known_fastest(base: Base, kept: Path | None) -> Base:
    """`fastest`, from the folder `kept` if these very files were tried before on such a device by these releases."""
    subject = f"ways-{base.device.type}-{str(base.dtype).removeprefix('torch.')}"
    releases = [torch.__version__, transformers.__version__, _TRIAL]
    found = recall(Path(base.path), kept, subject)
    with contextlib.suppress(msgspec.ValidationError, TypeError, KeyError):
        if found["releases"] == releases:
            return replace(base, ways=msgspec.convert(found["ways"], Ways))
    best = fastest(base)
    remember(Path(base.path), kept, subject, {"releases": releases, "ways": msgspec.to_builtins(best.ways)})
    return best


def fastest(base: Base, *, pass_tokens: float | None = None) -> Base:
    """`base` with the shortcuts that give what the plain way gives: losses and gradients. The others are left out, with
    a line in the log. `pass_tokens` is what a forward pass costs, in tokens, if not as much as is usual."""
    if pass_tokens is None:
        weights = sum(weight.numel() for weight in base.model.parameters())
        pass_tokens = _PASS_FLOPS_A_LAYER.get(base.device.type, 0.0) * base.layers / (4 * weights)
    plain = replace(base, ways=Ways(pass_tokens=pass_tokens))
    expected = _trial(plain, shared=False)
    found = plain
    for name in ("bare_head", "shared_prefix"):
        tried = replace(found, ways=replace(found.ways, **{name: True}))
        try:
            fault = _difference(expected, _trial(tried, shared=tried.ways.shared_prefix), base.dtype)
        # Whatever a model does not take, it also trains without.
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if fault:
            _log.warning("%s: no %s: %s", base.path, name, fault)
        else:
            found = tried
    return found


def _trial(base: Base, *, shared: bool) -> tuple[Tensor, Tensor]:
    """The logits, and the prompts' gradient."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(sum(_LENGTHS), base.hidden_size, generator=generator) * base.embedding_rms
    leaf = prompts.to(base.device).requires_grad_(True)
    pack = collate(_rows(base), _LENGTHS, base.device, with_prompts=not shared)
    if not shared:
        logits = plain_logits(base, leaf, pack)
        functional.cross_entropy(logits, pack.label_id, reduction="sum").backward()  # type: ignore[no-untyped-call]
    else:
        prefix = prefix_of(base, leaf, _LENGTHS, [1])
        logits = text_logits(base, prefix, pack)
        functional.cross_entropy(logits, pack.label_id, reduction="sum").backward()  # type: ignore[no-untyped-call]
        prefix.backward()
    assert leaf.grad is not None
    order = torch.argsort(pack.label_row, stable=True)
    return logits.detach()[order], leaf.grad


def _rows(base: Base) -> Sequence[tuple[int, Example]]:
    return [
        (prompt, Example(tuple((7 * row + 3 * i) % base.vocabulary for i in range(tokens)), targets))
        for row, (prompt, tokens, targets) in enumerate(_ROWS)
    ]


def _difference(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], dtype: torch.dtype) -> str:
    """What is wrong with `found`; "" if nothing is."""
    tolerance = _TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE)
    for what, wanted, given in zip(("logits", "gradients"), expected, found, strict=True):
        error = float((given - wanted).abs().max() / wanted.abs().max().clamp_min(1e-20))
        if not error <= tolerance:
            return f"its {what} differ by {error:.1e} from the plain way's"
    return ""

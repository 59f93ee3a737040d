"""Where a request's first prompt comes from: the bank, random numbers, or a text."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bank.store import Bank, DamagedEntry
from broker.protocol.errors import DataError
from broker.protocol.messages import Assign
from broker.protocol.states import Init
from tuner.data import Example
from tuner.model import Base
from tuner.packing import SCORED_TOKENS, score

_log = logging.getLogger(__name__)

# The newest prompts that the user may see are scored on a few training rows, and the best of them on more. In all that
# is 212 rows, the cost of some 13 steps of 8 rows: a prompt that fits saves about as many, and often more.
_CANDIDATES, _FIRST_SAMPLES = 32, 4
_FINALISTS, _SAMPLES = 4, 16


@dataclass(frozen=True, slots=True)
class Start:
    """A first prompt, [virtual tokens, hidden size] in float32 on the model's device, and where it came from."""

    prompt: Tensor
    name: str
    lookup_s: float = 0.0


def first_prompt(
    base: Base, bank: Bank, assign: Assign, train: Sequence[Example], max_tokens: int = SCORED_TOKENS
) -> Start:
    """The first prompt that `assign` asks for. A bank without anything better than random numbers gives those; its
    prompts are scored in passes of at most `max_tokens`.

    Raises `DataError` for an initial text without tokens."""
    spec = assign.spec
    if spec.init is Init.TEXT:
        return Start(text_prompt(base, spec.init_text, spec.virtual_tokens), "text")
    neutral = random_prompt(base, spec.virtual_tokens, spec.seed)
    if spec.init is Init.RANDOM:
        return Start(neutral, "random")
    began_mono_s = time.monotonic()
    found = _candidates(base, bank, assign)
    name = _best(base, neutral, found, _samples(train, spec.seed), max_tokens)
    return Start(found.get(name, neutral), name, time.monotonic() - began_mono_s)


def random_prompt(base: Base, virtual_tokens: int, seed: int) -> Tensor:
    """Normal noise of the size of the base's input embeddings: it carries no meaning that training must undo first."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(virtual_tokens, base.hidden_size, generator=generator)
    return (noise * base.embedding_rms).to(base.device)


@torch.no_grad()
def text_prompt(base: Base, text: str, virtual_tokens: int) -> Tensor:
    """The embeddings of a text's tokens, repeated or cut to length. Raises `DataError` for a text without tokens."""
    tokens = base.tokenize([text])[0]
    if not tokens:
        raise DataError("the initial text has no tokens", "give --init-text some words, or use another --init")
    repeated = (tokens * (virtual_tokens // len(tokens) + 1))[:virtual_tokens]
    return base.embed(torch.tensor(repeated, device=base.device)).float().clone()


def _candidates(base: Base, bank: Bank, assign: Assign) -> dict[str, Tensor]:
    entries = bank.recent(base.digest, assign.spec.virtual_tokens, assign.uid, assign.account, _CANDIDATES)
    found = {}
    for entry in entries:
        if entry.hidden_size != base.hidden_size:
            continue
        try:
            found[f"bank:{entry.digest[:12]}"] = torch.from_numpy(bank.load(entry)).to(base.device)
        except DamagedEntry as error:
            _log.warning("passed over: %s", error)
    return found


def _samples(train: Sequence[Example], seed: int) -> list[Example]:
    order = np.random.default_rng([seed, 2]).permutation(len(train))[:_SAMPLES]
    return [train[i] for i in order.tolist()]


def _best(base: Base, neutral: Tensor, found: dict[str, Tensor], samples: list[Example], max_tokens: int) -> str:
    """The candidate of lowest loss, of equal ones the newest. It must also beat the neutral prompt ("random") and a
    uniform guess: a prompt that is surer of wrong answers than a guess must be untaught first, and takes more steps
    than noise does."""
    if not found:
        return "random"
    if len(found) > _FINALISTS:
        losses = _losses(base, found, samples[:_FIRST_SAMPLES], max_tokens)
        found = {name: found[name] for name in sorted(found, key=losses.__getitem__)[:_FINALISTS]}
    losses = _losses(base, {"random": neutral, **found}, samples, max_tokens)
    losses["random"] = min(losses["random"], math.log(base.vocabulary))
    return min(losses, key=losses.__getitem__)


def _losses(base: Base, prompts: dict[str, Tensor], samples: list[Example], max_tokens: int) -> dict[str, float]:
    """Each prompt's loss; infinite where it is no number."""
    scores = score(base, [(prompt, samples) for prompt in prompts.values()], max_tokens)
    losses = [found.loss if math.isfinite(found.loss) else math.inf for found in scores]
    return dict(zip(prompts, losses, strict=True))

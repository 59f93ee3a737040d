"""A request that nobody made: small, and real to the engine, so that a worker's first step is not a user's."""

from __future__ import annotations

import json

from broker.protocol.messages import Assign
from broker.protocol.spec import RequestSpec
from broker.protocol.states import Init
from tuner.data import BatchOrder, load_dataset
from tuner.model import Base
from tuner.optimizer import PromptState
from tuner.run import History, Run
from tuner.start import random_prompt

_VIRTUAL_TOKENS = 8


def made_up_run(base: Base) -> Run:
    """A run of one short row, with no trace outside of itself: no checkpoint, no bank."""
    word = _word(base)
    row = json.dumps({"input": word, "target": word}).encode() + b"\n"
    virtual_tokens = max(1, min(_VIRTUAL_TOKENS, base.positions // 4))
    spec = RequestSpec(model="warm-up", train="0" * 64, virtual_tokens=virtual_tokens, init=Init.RANDOM, batch_size=1)
    assign = Assign(
        request_id=1, attempt=1, user="", uid=0, account="", spec=spec, train=row, eval=None
    )  # never seen outside: no message is made of it
    data = load_dataset(base, spec, row, None)
    prompt = random_prompt(base, virtual_tokens, 0)
    return Run(assign, data, BatchOrder(1, 1, 0), PromptState.new(prompt), prompt, History("random", 0.0))


def _word(base: Base) -> str:
    """The first text that this base's tokenizer has tokens for."""
    texts = (base.tokenizer.decode([token]) for token in range(len(base.tokenizer)))
    found: str = next(text for text in texts if text.strip() and base.tokenize([text])[0])
    return found

"""What packing is measured against: stock PEFT prompt tuning with torch's own AdamW, one request in one loop."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tuner.data import Example

Step = Callable[[], None]


def lone_step(model: Any, prompt: torch.Tensor, rows: Sequence[Example], device: torch.device) -> Step:
    """A function that runs one optimizer step on `rows`, padded to the longest. The base model is not changed."""
    peft: Any = importlib.import_module("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=len(prompt))
        tuned = peft.get_peft_model(model, config)
    tuned.eval()  # as a careful run does: dropout has no place in a frozen base
    weight = tuned.prompt_encoder["default"].embedding.weight
    weight.data.copy_(prompt)
    optimizer = torch.optim.AdamW([weight], lr=0.01)
    width = max(map(len, rows))
    ids = torch.tensor([[*row.tokens, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        labels[i, len(row) - row.targets : len(row)] = ids[i, len(row) - row.targets : len(row)]

    def step() -> None:
        loss = tuned(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

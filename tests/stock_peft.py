"""What stock transformers and PEFT make of a result folder: the measure of whether ours is what it says."""

from __future__ import annotations

import json
from pathlib import Path


def loss_of(base: Path, folder: Path, rows_file: Path) -> float:
    """Mean cross-entropy of each target token (and the end token) over all rows, of the prompt in `folder` on
    `base`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder))
    model.eval()
    total, count = 0.0, 0
    for line in rows_file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        source, target = (tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("input", "target"))
        target += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        labels = torch.tensor([[-100] * len(source) + target])
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([source + target]), labels=labels).loss
        total += float(mean) * len(target)
        count += len(target)
    return total / count

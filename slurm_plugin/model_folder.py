"""What can be told of a base model's directory without loading it: told when a broker starts, not by its workers."""

from __future__ import annotations

import json
from pathlib import Path

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "*.tiktoken", "tekken.json")
_WEIGHTS = ("*.safetensors", "*.bin")
_OTHER_TASKS = ("MaskedLM", "Classification", "QuestionAnswering", "MultipleChoice", "Seq2SeqLM")


def model_mistake(folder: Path) -> str:
    """Why no worker could serve the model in `folder` (`holds no tokenizer`); empty where nothing speaks against it."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except OSError:
        return "holds no config.json"
    except ValueError:
        return "holds a config.json that is not JSON"
    if not isinstance(config, dict):
        return "holds a config.json that is no JSON object"
    architectures = [str(name) for name in config.get("architectures") or []]
    other_task = bool(architectures) and all(name.endswith(_OTHER_TASKS) for name in architectures)
    if config.get("is_encoder_decoder") or other_task:
        return f"is no causal language model ({', '.join(architectures) or 'an encoder and a decoder'})"
    for what, patterns in (("tokenizer", _TOKENIZERS), ("weights", _WEIGHTS)):
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"holds no {what} ({', '.join(patterns)})"
    return ""

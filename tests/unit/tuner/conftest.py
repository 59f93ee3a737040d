"""Tiny base models of three families, written once, and requests to tune on them."""

from __future__ import annotations

import functools
import json
import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgspec
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from broker.protocol.messages import Assign
from broker.protocol.spec import RequestSpec
from tuner.model import Base, load_base
from tuner.session import Session

torch.set_num_threads(1)

WORDS = list(string.ascii_letters[:40])
FAMILIES = ["llama", "gpt2", "qwen2"]


def _config(family: str) -> Any:
    sizes = {"vocab_size": 2 * len(WORDS) + 4, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    if family == "gpt2":
        return GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes)
    if family == "gpt_neox":
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
        return GPTNeoXConfig(hidden_size=32, intermediate_size=64, **heads, **sizes)
    if family == "gemma":
        sizes["head_dim"] = 8
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig, "gemma": GemmaConfig}[family]
    return kind(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **sizes,
    )


def _write_tokenizer(directory: Path, family: str) -> None:
    """A tokenizer of one token a word; the empty text has none."""
    special = ["<pad>", "<unk>", "<eos>"]
    if family == "qwen2":  # transformers gives this family its own byte-level pair encoding, whatever the files say
        tokens = [*special, *WORDS, "Ġ", *(f"Ġ{word}" for word in WORDS)]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", word) for word in WORDS]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)


@pytest.fixture(scope="session")
def model_dirs(make_model_dir: Callable[[str], Path]) -> dict[str, Path]:
    """One directory for each of the families that most tests run on."""
    return {family: make_model_dir(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def make_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's model, its weights large enough that prompts matter."""

    @functools.cache
    def make(family: str) -> Path:
        directory = tmp_path_factory.mktemp(family)
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(_config(family))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(5)
        model.save_pretrained(directory)
        _write_tokenizer(directory, family)
        return directory

    return make


@pytest.fixture(scope="session")
def bases(model_dirs: dict[str, Path]) -> dict[str, Base]:
    return {family: load_base(str(directory))[0] for family, directory in model_dirs.items()}


@pytest.fixture(scope="session")
def base(bases: dict[str, Base]) -> Base:
    return bases["llama"]


def json_lines(rows: list[tuple[str, str]]) -> bytes:
    return b"".join(json.dumps({"input": given, "target": wanted}).encode() + b"\n" for given, wanted in rows)


def made_up_rows(count: int, *, first: int = 0) -> bytes:
    """Rows of different lengths whose target repeats the input's last words."""
    rows = []
    for i in range(first, first + count):
        words = [WORDS[(7 * i + 3 * j) % len(WORDS)] for j in range(2 + i % 5)]
        rows.append((" ".join(words), " ".join(words[-(1 + i % 2) :])))
    return json_lines(rows)


def request(request_id: int = 1, *, attempt: int = 1, rows: bytes | None = None, **fields: Any) -> Assign:
    """An assignment; `fields` are those of its spec."""
    evaluation = fields.pop("evaluation", None)
    user = {name: fields.pop(name) for name in ("uid", "user", "account") if name in fields}
    settings = {"model": "tiny", "train": "0" * 64, "init": "random", "virtual_tokens": 4, "max_steps": 10} | fields
    return Assign(
        request_id=request_id,
        attempt=attempt,
        **({"uid": 1000, "user": "alice", "account": "physics"} | user),
        spec=msgspec.convert(settings, RequestSpec),
        train=made_up_rows(30) if rows is None else rows,
        eval=evaluation,
    )


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Assign]:
    return request


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., bytes]:
    return made_up_rows


@pytest.fixture
def make_session(make_model_dir: Callable[[str], Path], tmp_path: Path) -> Callable[..., Session]:
    """Loaded sessions that share one bank and one checkpoint directory."""

    def make(family: str = "llama", *, checkpoint_s: float = 1e9) -> Session:
        session = Session(
            model_path=str(make_model_dir(family)),
            bank_dir=tmp_path / "bank",
            checkpoint_dir=tmp_path / "checkpoints",
            checkpoint_s=checkpoint_s,
            slots=8,
        )
        session.load()
        return session

    return make

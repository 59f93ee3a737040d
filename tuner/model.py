"""A frozen base model: checked, loaded, and what tuning needs to know of it."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.protocol.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_HASH_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Ways:
    """The shortcuts that a model allows, each exact. Without them every row carries its own copy of its prompt through
    the whole model, head included: the reference."""

    shared_prefix: bool = False  # a prompt's keys and values, computed once, serve all its rows
    bare_head: bool = False  # the head may be put on chosen places of the backbone's last hidden states
    pass_tokens: float = 0.0  # what one more forward pass costs, in tokens

    @property
    def words(self) -> str:
        """For the log."""
        return f"shared_prefix={self.shared_prefix} bare_head={self.bare_head} pass_tokens={self.pass_tokens:.0f}"


@dataclass(frozen=True, slots=True)
class Base:
    """One base model on its device: frozen, without dropout. No gradient ever reaches its weights."""

    path: str
    digest: str  # sha256 over config.json and the weights
    model: Any  # transformers' PreTrainedModel, which has no types
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    layers: int
    heads: int
    positions: int  # the longest sequence, virtual tokens included
    vocabulary: int  # tokens that it chooses among
    embedding_rms: float  # of the input embeddings: the size of a neutral first prompt
    accepts: frozenset[str]  # optional arguments of its forward
    window: int | None = None  # how far back some of its layers look; None: to the first token
    ways: Ways = Ways()  # the plain one until `tuner.ways` has tried the others

    def embed(self, ids: Tensor) -> Tensor:
        """The input embeddings of token ids."""
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        return embedded

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text, without special ones."""
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    @property
    def end_token(self) -> list[int]:
        """The token that ends each target: none if the tokenizer has none."""
        token = self.tokenizer.eos_token_id
        return [] if token is None else [int(token)]


def load_base(path: str) -> tuple[Base, dict[str, float]]:
    """The base model in the directory `path`, on the GPU (bfloat16) if there is one, else on the CPU (float32); and the
    seconds of each phase: "imports", "read", "to_device".

    Raises `ConfigError` for a directory that is missing or holds no causal language model that can be loaded."""
    directory = Path(path)
    _check_directory(directory)
    clock = _Phases()
    torch, transformers = _import_libraries()
    clock.end("imports")
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    options = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = _loaded(directory, "tokenizer", lambda: transformers.AutoTokenizer.from_pretrained(path, **options))
    model = _loaded(
        directory,
        "model",
        lambda: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **options),
    )
    digest = base_digest(directory)
    clock.end("read")
    model.to(device)
    model.eval()
    model.requires_grad_(False)
    base = _describe(path, digest, model, tokenizer)
    clock.end("to_device")
    return base, clock.seconds


def base_digest(directory: Path) -> str:
    """sha256 over config.json and the safetensors files, in the order of their names, with names and sizes."""
    whole = hashlib.sha256()
    for file in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        whole.update(f"{file.name}:{file.stat().st_size}\n".encode())
        with open(file, "rb") as content:
            while block := content.read(_HASH_BLOCK):
                whole.update(block)
    return whole.hexdigest()


class _Phases:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last_mono_s = time.monotonic()

    def end(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = now - self._last_mono_s
        self._last_mono_s = now


def _check_directory(directory: Path) -> None:
    """What can be known before the slow imports."""
    if not directory.is_dir():
        raise ConfigError(f"the model directory {directory} is not there", "correct its `path` in the site file")
    try:
        config = json.loads((directory / "config.json").read_bytes())
        names = config.get("architectures") or []
    except FileNotFoundError:
        raise ConfigError(
            f"the model directory {directory} has no config.json", "name a directory that `save_pretrained` wrote"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{directory}/config.json cannot be read: {error}") from None
    causal = any(str(name).endswith(_CAUSAL_HEADS) for name in names) and not config.get("is_encoder_decoder")
    if not causal:
        kind = ", ".join(map(str, names)) or config.get("model_type", "of no named architecture")
        raise ConfigError(
            f"{directory} is no causal language model: its config.json says {kind}",
            "prompt tuning needs a decoder, such as a LlamaForCausalLM or GPT2LMHeadModel",
        )
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(f"the model directory {directory} has no tokenizer", "save the model's tokenizer beside it")
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(
            f"the model directory {directory} has no safetensors file", "pickled weights are never loaded: convert them"
        )


def _import_libraries() -> tuple[Any, Any]:
    # A missing file would otherwise be looked for on the network, for half a minute.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(int((os.environ.get("OMP_NUM_THREADS") or "1").split(",")[0]))
    return torch, transformers


def _loaded(directory: Path, what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    # Whatever the library trips over in a user's files, the directory is what is wrong.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"the {what} in {directory} cannot be loaded: {reason}") from error


def _describe(path: str, digest: str, model: Any, tokenizer: Any) -> Base:
    config = model.config.get_text_config()
    weight = model.get_input_embeddings().weight
    return Base(
        path=path,
        digest=digest,
        model=model,
        tokenizer=tokenizer,
        device=weight.device,
        dtype=weight.dtype,
        hidden_size=int(weight.shape[1]),
        layers=int(config.num_hidden_layers),
        heads=int(config.num_attention_heads),
        positions=int(getattr(config, "max_position_embeddings", None) or 1 << 20),
        vocabulary=int(config.vocab_size),
        embedding_rms=float(weight.float().pow(2).mean().sqrt()),
        accepts=frozenset(inspect.signature(model.forward).parameters),
        window=getattr(config, "sliding_window", None),
    )

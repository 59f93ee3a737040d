"""A frozen base model: checked, loaded, and what tuning needs to know of it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.protocol.errors import ConfigError
from tuner.bundle import tokenizer_digest
from tuner.reading import Digest, read_once

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tuner.weights import Weights

_CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")
_OPTIONS = {"local_files_only": True, "trust_remote_code": False}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


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
    hashing: Digest
    weights: Weights  # on the device only while they are `placed`
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
    tokenizer_digest: str | None = None  # of the tokenizer.json that was loaded
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
    def digest(self) -> str:
        """sha256 over config.json and the weights; the first call may have to wait for it."""
        return self.hashing.value()

    @property
    def end_token(self) -> list[int]:
        """The token that ends each target: none if the tokenizer has none."""
        token = self.tokenizer.eos_token_id
        return [] if token is None else [int(token)]


class Disturbing(Exception):
    """This model needs transformers' own loader, which changes settings of the whole process while it works."""


def load_base(path: str, kept: Path | None = None, *, beside_training: bool = False) -> tuple[Base, dict[str, float]]:
    """The base model in the directory `path`, and the seconds of each phase: "imports", "read", "to_device".

    It computes on the GPU (bfloat16) if there is one, else on the CPU: in bfloat16 if it is written so and the CPU
    multiplies that, else in float32. `kept` is a private folder for what other processes need not find out again.

    With `beside_training` another thread may be training: then the weights are not placed yet. Raises `ConfigError` for
    a directory that is missing or holds no causal language model that can be loaded, `Disturbing` for a model that
    cannot be loaded beside training."""
    directory = Path(path)
    written_in = _check_directory(directory)
    clock = _Phases()
    torch, _ = _import_libraries()
    from tuner.weights import Weights, mapped_model, weight_files

    clock.end("imports")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda or (written_in == "bfloat16" and _multiplies_bfloat16()) else torch.float32
    read_once(directory, weight_files(directory), kept)
    hashing = Digest(directory, kept)
    tokenizer = _loaded(directory, "tokenizer", lambda: _auto("Tokenizer").from_pretrained(path, **_OPTIONS))
    model = _loaded(directory, "model", lambda: mapped_model(directory))
    mapped = model is not None
    if not mapped:
        model = _library_model(directory, dtype, beside_training)
    model.eval()
    model.requires_grad_(False)
    clock.end("read")
    weights = Weights(model, device, dtype if mapped else None)
    base = _describe(path, hashing, weights, model, tokenizer)
    if not weights.placed and not beside_training:
        weights.place()
    clock.end("to_device")
    return base, clock.seconds


def import_ahead(paths: Iterable[str]) -> None:
    """Imports all that loading and training these models takes, without threads and without touching a GPU, so that the
    process can be forked. What is wrong with a model is left to `load_base` to tell."""
    _, transformers = _import_libraries()
    importlib.import_module("tuner.engine")
    importlib.import_module("tuner.weights")
    for path in paths:
        with contextlib.suppress(Exception):
            config = transformers.AutoConfig.from_pretrained(path, **_OPTIONS)
            transformers.AutoTokenizer.from_pretrained(path, **_OPTIONS)
            for name in config.architectures:
                getattr(transformers, name)


def _library_model(directory: Path, dtype: Any, beside_training: bool) -> Any:
    """The model as transformers itself loads it."""
    if beside_training:
        raise Disturbing(str(directory))
    load = _auto("ModelForCausalLM").from_pretrained
    options = {"dtype": dtype, "use_safetensors": True, **_OPTIONS}
    return _loaded(directory, "model", lambda: load(str(directory), **options))


def _auto(kind: str) -> Any:
    return getattr(importlib.import_module("transformers"), f"Auto{kind}")


class _Phases:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last_mono_s = time.monotonic()

    def end(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = now - self._last_mono_s
        self._last_mono_s = now


def _check_directory(directory: Path) -> str:
    """What can be known before the slow imports; the type that the weights are said to be written in."""
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
    return str(config.get("dtype") or config.get("torch_dtype") or "")


def _multiplies_bfloat16() -> bool:
    """Whether this CPU does so by itself: twice as fast as float32 then, else many times slower."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


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


def _describe(path: str, hashing: Digest, weights: Weights, model: Any, tokenizer: Any) -> Base:
    torch: Any = importlib.import_module("torch")
    config = model.config.get_text_config()
    weight = model.get_input_embeddings().weight
    return Base(
        path=path,
        hashing=hashing,
        weights=weights,
        model=model,
        tokenizer=tokenizer,
        device=weights.device,
        dtype=weights.dtype or weight.dtype,
        hidden_size=int(weight.shape[1]),
        layers=int(config.num_hidden_layers),
        heads=int(config.num_attention_heads),
        positions=int(getattr(config, "max_position_embeddings", None) or 1 << 20),
        vocabulary=int(config.vocab_size),
        embedding_rms=float(torch.linalg.vector_norm(weight, dtype=torch.float32)) / weight.numel() ** 0.5,
        accepts=frozenset(inspect.signature(model.forward).parameters),
        window=getattr(config, "sliding_window", None),
        tokenizer_digest=tokenizer_digest(Path(path)),
    )

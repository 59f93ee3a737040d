"""A model's weights: mapped from its safetensors files without a copy, and moved to where they compute and back.

The mapped files are the host's copy: all processes of a node share its pages, and the frozen base never writes to them.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
# What makes the memory of weights that a file is about to replace. Anything else (rotary tables, masks) is computed for
# real: no file holds it.
_UNWRITTEN = frozenset({torch.empty, torch.rand, torch.randn, torch.normal})


class Weights:
    """The parameters and buffers of one model: on the host always, on its device from `place()` to `withdraw()`."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype | None) -> None:
        """`model` is on the host; `dtype` is that of what its files hold, while it computes: None for as it is."""
        self.device, self.dtype = device, dtype
        self._host: list[tuple[Tensor, Tensor, torch.dtype]] = []  # of the model, its data on the host, its type there
        written = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        for tensor in (*model.parameters(), *model.buffers()):
            cast = tensor.is_floating_point() and id(tensor) in written  # rotary tables stay exact
            self._host.append((tensor, tensor.data, dtype if cast and dtype else tensor.dtype))
        self.placed = self.device_bytes == 0

    @property
    def device_bytes(self) -> int:
        """What the device needs room for: nothing where the mapped files themselves serve."""
        return sum(
            host.numel() * dtype.itemsize
            for _, host, dtype in self._host
            if host.device.type != self.device.type or host.dtype != dtype
        )

    def place(self) -> float:
        """Makes the model compute on its device, in its type; the seconds taken. Nothing changed if it raises an
        out-of-memory error."""
        began_mono_s = time.monotonic()
        placed = [host.to(self.device, dtype) for _, host, dtype in self._host]
        for (tensor, _, _), data in zip(self._host, placed, strict=True):
            tensor.data = data
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.placed = True
        return time.monotonic() - began_mono_s

    def withdraw(self) -> None:
        """Frees the device: the weights are those of the host again."""
        for tensor, host, _ in self._host:
            tensor.data = host
        self.placed = self.device_bytes == 0


def mapped_model(directory: Path) -> Any | None:
    """The causal language model in `directory`, its weights mapped from the files in the type that they are written in;
    None for a model that this cannot do exactly: transformers' own loader must.

    Sets nothing that other threads could see. Raises what transformers raises for a damaged directory."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    files = weight_files(directory)
    if kind is None or not files or getattr(config, "quantization_config", None):
        return None
    try:
        with _Unwritten():
            model = kind(config)
    # Whatever a model's constructor does with memory that holds nothing yet.
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        return None
    # Parts that must stay in float32 beside others are a rule of the library's loader.
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return None
    if not _fill(model, files):
        return None
    if (directory / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    return model


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the model in `directory`; none where that is not plain."""
    if (directory / _WHOLE).is_file():
        return [directory / _WHOLE]
    try:
        index: Mapping[str, str] = json.loads((directory / _INDEX).read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError):
        return []
    names = sorted(set(index.values()))
    return [directory / name for name in names] if all(Path(name).name == name for name in names) else []


class _Unwritten(TorchFunctionMode):
    """Within it, this thread's new weights get no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _UNWRITTEN and kwargs.get("device") is None and not kwargs.get("out"):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _fill(model: Any, files: list[Path]) -> bool:
    """Gives the model the tensors of the files; whether each has its place and each place its tensor."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError:  # another shape
        return False
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if unexpected or not set(missing) <= tied:
        return False
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))

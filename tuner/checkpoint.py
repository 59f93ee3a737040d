"""A running request on disk, so that a lost worker costs seconds: the next attempt goes on exactly from there."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import safetensors.torch
from msgspec import Struct
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bank.files import write_whole
from tuner.model import Base
from tuner.optimizer import PromptState
from tuner.run import History, Run

_log = logging.getLogger(__name__)


class _Meta(Struct, frozen=True, forbid_unknown_fields=True):
    spec_digest: str
    attempt: int
    step: int
    history: History


class Resumed(Struct, frozen=True):
    """What a checkpoint held."""

    state: PromptState
    best_prompt: Tensor
    history: History


class Checkpoints:
    """One file for each request in a directory that all workers of a pool share."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, run: Run, spec_digest: str) -> bool:
        """Keeps the request durably, whole or not at all, mode 0600. A later attempt's file is never replaced: then
        False. Raises `OSError` when the disk does."""
        path = self._path(run.assign.request_id)
        kept = self._meta(path)
        if kept is not None and kept.attempt > run.assign.attempt:
            return False
        meta = _Meta(spec_digest, run.assign.attempt, run.state.step, run.history)
        tensors = {"prompt": run.state.prompt, "m": run.state.m, "v": run.state.v, "best": run.best_prompt}
        data = safetensors.torch.save(
            {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()},
            metadata={"prompttuner": msgspec.json.encode(meta).decode()},
        )
        write_whole(path, data)
        return True

    def load(self, request_id: int, spec_digest: str, base: Base, virtual_tokens: int) -> Resumed | None:
        """The request as it was kept; None without a file, and for a file that is damaged or another request's."""
        path = self._path(request_id)
        meta = self._meta(path)
        if meta is None or meta.spec_digest != spec_digest:
            return None
        try:
            tensors = safetensors.torch.load_file(path, device=str(base.device))
            prompt, m, v, best = (tensors[name] for name in ("prompt", "m", "v", "best"))
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            _log.warning("checkpoint %s is damaged, the request starts anew: %s", path.name, error)
            return None
        if any(tensor.shape != (virtual_tokens, base.hidden_size) for tensor in (prompt, m, v, best)):
            return None
        return Resumed(PromptState(prompt=prompt, m=m, v=v, step=meta.step), best, meta.history)

    def remove(self, request_id: int, attempt: int) -> None:
        """Removes the request's file, unless a later attempt wrote it."""
        path = self._path(request_id)
        kept = self._meta(path)
        if kept is None or kept.attempt <= attempt:
            path.unlink(missing_ok=True)

    def _path(self, request_id: int) -> Path:
        return self._directory / f"{request_id}.safetensors"

    def _meta(self, path: Path) -> _Meta | None:
        try:
            with safe_open(path, framework="pt") as file:
                return msgspec.json.decode((file.metadata() or {}).get("prompttuner", ""), type=_Meta)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, msgspec.MsgspecError) as error:
            _log.warning("checkpoint %s cannot be read: %s", path.name, error)
            return None

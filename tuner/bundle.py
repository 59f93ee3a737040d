"""A result folder and the base model that it is for: a prompt means nothing to another one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from broker.protocol.errors import ConfigError
from tuner.reading import base_digest

REPORT = "prompttuner.json"


def tokenizer_digest(model_path: Path) -> str | None:
    """sha256 of the model directory's tokenizer.json; None without one."""
    try:
        with open(model_path / "tokenizer.json", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def check_base(folder: Path, model_path: Path) -> None:
    """Raises `ConfigError`, with both digests, unless the prompt in `folder` was tuned on the model (weights,
    config.json and tokenizer.json) in `model_path`; and for a folder or model directory that cannot be read."""
    report = _report(folder)
    try:
        found = {"base model": base_digest(model_path), "tokenizer": tokenizer_digest(model_path)}
    except OSError as error:
        raise ConfigError(f"{model_path}: {error.strerror}", "name a model directory") from None
    for what, key in (("base model", "base_digest"), ("tokenizer", "tokenizer_digest")):
        if report.get(key) != found[what]:
            raise ConfigError(
                f"{folder} was tuned on the {what} {report.get(key)}, and {model_path} has the {what} {found[what]}",
                f"use the prompt with the model that it was tuned on, there at {report.get('base_path')}",
            )


def _report(folder: Path) -> dict[str, Any]:
    try:
        report = json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / REPORT} cannot be read: {error}", "name a folder that ptfetch wrote") from None
    if not isinstance(report, dict):
        raise ConfigError(f"{folder / REPORT} is no report", "name a folder that ptfetch wrote")
    return report

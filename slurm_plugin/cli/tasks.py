"""Presets of `--task`: defaults for options that nobody gave. The request carries plain values, never the task."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from broker.protocol.states import Metric


class Task(StrEnum):
    """Kinds of work that users name."""

    CLASSIFICATION = "classification"
    GENERATION = "generation"
    SUMMARIZATION = "summarization"


# Patience is longer than the six evaluations after which a request that stalls begins anew.
_PRESETS: dict[Task, dict[str, str | int]] = {
    Task.CLASSIFICATION: {
        "metric": Metric.LABEL_ACCURACY.value,
        "eval_every": 10,
        "patience": 15,
        "batch_size": 16,
    },
    Task.GENERATION: {"metric": Metric.LOSS.value, "eval_every": 10, "patience": 10, "batch_size": 8},
    Task.SUMMARIZATION: {"metric": Metric.LOSS.value, "eval_every": 20, "patience": 8, "batch_size": 4},
}


def presets_help() -> str:
    """What each task chooses, for `--help`."""
    return "; ".join(f"{task.value}: {_words(chosen)}" for task, chosen in _PRESETS.items())


def fill_in(options: dict[str, Any]) -> None:
    """Gives the options that no source gave the task's values. Without a task, nothing changes."""
    if options["task"] is not None:
        for name, value in _PRESETS[Task(options["task"])].items():
            if options[name] is None:
                options[name] = value


def _words(chosen: dict[str, str | int]) -> str:
    return " ".join(f"--{name.replace('_', '-')}={value}" for name, value in chosen.items())

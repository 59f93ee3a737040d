"""What every benchmark prints: its figures, with the machine, the versions and the number of runs."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("prompttuner-slurm", "click", "msgspec", "pyzmq", "torch", "transformers")


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the option that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return parser


def emit(name: str, figures: dict[str, Any], runs: int, as_json: bool) -> None:
    """Prints the document, or a table of it."""
    document = {"benchmark": name, **figures, "runs": runs, "machine": _machine(), "versions": _versions()}
    if as_json:
        print(json.dumps(document))
        return
    for key, value in document.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{key:<24} {shown:.6g}" if isinstance(shown, float) else f"{key:<24} {shown}")


def _machine() -> dict[str, Any]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory_gib), "kernel": platform.release()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found

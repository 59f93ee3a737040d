"""Turns among processes: one at a time, over with their holder whatever ends it, and never in the way for long."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuner.turns import name_of, node_folder, turn

HOLD = """
import pathlib, sys
from tuner.turns import turn
with turn(pathlib.Path(sys.argv[1]), "x", 2) as held:
    print(held, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds one of two turns "x"."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "True\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_as_many_hold_a_turn_as_may(tmp_path: Path) -> None:
    with holder(tmp_path), turn(tmp_path, "x", 2, limit_s=0.1) as second:
        assert second
    with holder(tmp_path), holder(tmp_path), turn(tmp_path, "x", 2, limit_s=0.1) as third:
        assert not third


def test_kill_9_ends_a_turn(tmp_path: Path) -> None:
    with holder(tmp_path), holder(tmp_path) as second:
        second.kill()
        began_s = time.monotonic()
        with turn(tmp_path, "x", 2, limit_s=60) as held:
            assert held
        assert time.monotonic() - began_s < 60


def test_without_a_folder_work_goes_on(tmp_path: Path) -> None:
    with turn(None, "x") as held:
        assert not held
    (tmp_path / "file").touch()
    with turn(tmp_path / "file", "x") as held:
        assert not held


def test_the_nodes_folder_is_private() -> None:
    folder = node_folder()
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700


def test_one_directory_has_one_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert name_of(tmp_path / "link") == name_of(tmp_path) != name_of(tmp_path.parent)

"""Model files are read ahead, and their digest is computed once for each state of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tuner import reading
from tuner.model import load_base
from tuner.reading import Digest, base_digest, cached, known_digest, read_ahead, read_once
from tuner.session import Session


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(3 * reading.CHUNK + 1))
    return path


def test_every_byte_is_read(file: Path) -> None:
    assert read_ahead([file, file.with_name("missing")]) == 3 * reading.CHUNK + 1


def test_a_file_that_was_read_is_cached(file: Path) -> None:
    read_once(file.parent, [file])
    assert cached(file) or not on_disk(file)
    assert not cached(file.with_name("missing"))


def on_disk(file: Path) -> bool:
    """Whether the filesystem has a page cache that answers."""
    with open(file, "rb") as opened:
        try:
            return os.preadv(opened.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except OSError:
            return False


def test_the_digest_is_computed_once_for_each_state_of_the_files(
    model_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = tmp_path / "model", tmp_path / "kept"
    shutil.copytree(model_dirs["llama"], model)
    wanted = base_digest(model)
    computed = []
    monkeypatch.setattr(reading, "base_digest", lambda directory: computed.append(1) or base_digest(directory))
    assert [known_digest(model, kept) for _ in range(3)] == [wanted] * 3
    assert len(computed) == 1
    assert kept.stat().st_mode & 0o777 == 0o700
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert known_digest(model, kept) == base_digest(model) != wanted
    [file] = kept.glob("*.json")
    file.write_text("damaged")
    assert known_digest(model, kept) == base_digest(model)


def test_readiness_does_not_wait_for_the_digest(
    model_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(Digest, "value", lambda self: asked.append(1) or "0" * 64)
    session = Session(
        model_path=str(model_dirs["llama"]),
        bank_dir=tmp_path / "bank",
        checkpoint_dir=tmp_path / "checkpoints",
        checkpoint_s=1e9,
        slots=1,
    )
    session.load()
    session.warm_up()
    session.first_step()
    assert not asked


def test_a_loaded_base_has_the_digest_of_its_files(model_dirs: dict[str, Path]) -> None:
    base, _ = load_base(str(model_dirs["gpt2"]))
    assert base.digest == base_digest(model_dirs["gpt2"])

"""The bank keeps prompts whole, hands out only what a user may see, and survives damage."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from bank.entries import Entry
from bank.store import Bank, DamagedEntry

BASE = "a" * 64


def entry(**fields: Any) -> Entry:
    settings: dict[str, Any] = {
        "digest": "0" * 64,
        "base_digest": BASE,
        "virtual_tokens": 4,
        "hidden_size": 8,
        "uid": 1000,
        "user": "alice",
        "account": "physics",
        "share": "private",
        "metric": "loss",
        "score": 0.05,
        "loss": 0.05,
        "steps": 20,
        "start": "random",
        "created_unix_s": 1000.0,
        "converged": True,
    }
    return Entry(**(settings | fields))


def prompt(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 8)).astype(np.float32)


def seen_by(bank: Bank, uid: int, account: str = "physics", limit: int = 8) -> list[Entry]:
    return bank.recent(BASE, 4, uid, account, limit)


def files_of(directory: Path, suffix: str) -> list[Path]:
    return sorted(directory.rglob(f"*{suffix}"))


def test_a_published_prompt_comes_back_bit_by_bit(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    digest = bank.publish(prompt(), entry(job_name="first"))
    (found,) = seen_by(bank, 1000)
    assert found.digest == digest
    assert found.job_name == "first"
    assert np.array_equal(bank.load(found), prompt())


def test_the_newest_come_first_and_no_more_than_asked(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    for i in [3, 1, 4, 2, 5]:
        bank.publish(prompt(i), entry(created_unix_s=float(i)))
    assert [found.created_unix_s for found in seen_by(bank, 1000, limit=3)] == [5.0, 4.0, 3.0]


def test_a_prompt_published_twice_is_offered_once(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    for created in (1.0, 2.0):
        bank.publish(prompt(), entry(created_unix_s=created))
    assert len(seen_by(bank, 1000)) == 1


@pytest.mark.parametrize(
    ("share", "uid", "account", "visible"),
    [
        ("private", 1000, "physics", True),
        ("private", 1000, "chemistry", True),
        ("private", 1001, "physics", False),
        ("account", 1001, "physics", True),
        ("account", 1001, "chemistry", False),
        ("all", 1001, "chemistry", True),
    ],
)
def test_only_who_may_see_a_prompt_sees_it(tmp_path: Path, share: str, uid: int, account: str, visible: bool) -> None:
    bank = Bank(tmp_path)
    bank.publish(prompt(), entry(share=share))
    assert bool(seen_by(bank, uid, account)) is visible


def test_stalled_prompts_and_those_of_other_bases_or_lengths_are_not_offered(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    bank.publish(prompt(), entry(converged=False))
    bank.publish(prompt(), entry(base_digest="b" * 64))
    bank.publish(np.zeros((2, 8), np.float32), entry(virtual_tokens=2))
    assert seen_by(bank, 1000) == []


def test_a_bank_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert seen_by(Bank(tmp_path / "missing"), 1000) == []


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o377])
def test_all_that_it_makes_is_its_owners_alone_under_any_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        Bank(tmp_path / "site" / "bank").publish(prompt(), entry())
    finally:
        os.umask(before)
    made = list((tmp_path / "site").rglob("*"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in made if path.is_dir()} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in made if path.is_file()} == {0o600}


def test_nothing_half_written_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="disk full"):
        Bank(tmp_path).publish(prompt(), entry())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_prompt_without_its_entry_is_not_offered(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    bank.publish(prompt(), entry())
    (committed,) = files_of(tmp_path, ".json")
    committed.unlink()
    assert seen_by(bank, 1000) == []


@pytest.mark.parametrize("damage", [b"", b"{", b'{"digest": "../../etc"}', b"\xff" * 70_000])
def test_a_damaged_entry_is_passed_over(tmp_path: Path, damage: bytes) -> None:
    bank = Bank(tmp_path)
    bank.publish(prompt(1), entry(created_unix_s=1.0))
    (old,) = files_of(tmp_path, ".json")
    bank.publish(prompt(2), entry(created_unix_s=2.0))
    new = next(path for path in files_of(tmp_path, ".json") if path != old)
    new.write_bytes(damage)
    assert [found.created_unix_s for found in seen_by(bank, 1000)] == [1.0]


def published(tmp_path: Path) -> tuple[Bank, Entry, Path]:
    bank = Bank(tmp_path)
    bank.publish(prompt(), entry())
    (kept,) = files_of(tmp_path, ".safetensors")
    return bank, seen_by(bank, 1000)[0], kept


def test_a_prompt_that_was_cut_altered_swollen_or_lost_is_refused(tmp_path: Path) -> None:
    bank, found, kept = published(tmp_path)
    whole = kept.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), whole + bytes(1 << 20), b""):
        kept.write_bytes(damaged)
        with pytest.raises(DamagedEntry):
            bank.load(found)
    kept.unlink()
    with pytest.raises(DamagedEntry):
        bank.load(found)


def test_a_damaged_prompt_is_mended_by_publishing_it_again(tmp_path: Path) -> None:
    bank, found, kept = published(tmp_path)
    kept.write_bytes(kept.read_bytes()[:-1])
    bank.publish(prompt(), entry(created_unix_s=2000.0))
    assert np.array_equal(bank.load(found), prompt())


def test_a_prompt_behind_a_link_is_refused(tmp_path: Path) -> None:
    bank, found, kept = published(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    kept.rename(elsewhere)
    kept.symlink_to(elsewhere)
    with pytest.raises(DamagedEntry):
        bank.load(found)


@pytest.mark.parametrize(
    "tensors",
    [
        {"prompt": np.zeros((4, 8), np.float64)},
        {"prompt": np.zeros((8, 4), np.float32)},
        {"prompt": np.full((4, 8), np.nan, np.float32)},
        {"prompt": np.full((4, 8), 1e9, np.float32)},
        {"other": np.zeros((4, 8), np.float32)},
    ],
    ids=["type", "shape", "not finite", "too large", "name"],
)
def test_a_file_of_the_right_digest_and_the_wrong_content_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    import hashlib

    data = safetensors.numpy.save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    kept = tmp_path / "objects" / digest[:2] / f"{digest}.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(data)
    with pytest.raises(DamagedEntry):
        Bank(tmp_path).load(msgspec.structs.replace(entry(), digest=digest))


@pytest.mark.parametrize(
    "bad", [np.full((4, 8), np.inf, np.float32), np.zeros((4, 9), np.float32), np.full((4, 8), 1e5, np.float32)]
)
def test_a_prompt_that_could_not_be_loaded_is_not_published(tmp_path: Path, bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"its shape|not finite|beyond"):
        Bank(tmp_path).publish(bad, entry())
    assert list(tmp_path.iterdir()) == []

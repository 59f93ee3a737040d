"""What is acknowledged is on disk, whole; what cannot be read is refused by name and never replaced by nothing."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.protocol.errors import ConfigError, PromptTunerError, Transient
from broker.protocol.states import RequestState
from broker.state import events
from broker.state.model import Learned, PoolHealth, State
from broker.store import journal as journal_module
from broker.store.journal import Batch, Journal
from tests.unit.broker.worlds import World, encoded

COMMITTER = Path(__file__).with_name("commit_for_ever.py")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


def commit(journal: Journal, world: World, blobs: dict[str, bytes] | None = None) -> None:
    """Commits what has happened in the world since the last commit."""
    world.state.tag = journal.tag
    batch = Batch(events=[(now.unix_s, event) for now, event in world.journal], blobs=blobs or {})
    journal.commit(batch, world.state)
    world.journal.clear()


def reopened(path: Path, world: World) -> tuple[Journal, State]:
    journal = Journal(path)
    state = State(site=world.state.site, tag=journal.tag)
    journal.fill(state)
    return journal, state


def busy_world() -> World:
    world = World()
    world.worker()
    ended, _, _ = world.admit(), world.admit(deadline_unix_s=world.now.unix_s + 900), world.admit()
    world.decide()
    world.tick(5)
    world.finish(ended, result="d" * 64)
    world.state.learned["a"] = Learned(steps=10.0, load_s=3.0)
    world.state.health["b"] = PoolHealth(failures=2, paused_until_unix_s=7.0, reason="bad account")
    return world


def test_what_was_committed_is_there_after_a_reopen(path: Path) -> None:
    world, journal = busy_world(), Journal(path)
    tag = journal.tag
    told = list(world.journal)
    commit(journal, world, {"d" * 64: b"result"})
    journal.close()
    journal, state = reopened(path, world)
    again = World(world.state.site)
    again.state = state
    world.state.outlook = {}
    assert encoded(again.view()) == encoded(world.view())
    assert journal.tag == tag
    assert [event for _, event in journal.events()] == [event for _, event in told]
    assert journal.blob("d" * 64) == b"result"
    assert journal.blob("e" * 64) is None
    ended = journal.request(1)
    assert ended is not None and ended.state is RequestState.COMPLETED
    assert journal.id_of_key(ended.submit_key) == 1, "a re-sent submission is known after its end"
    assert journal.id_of_key("never") is None
    journal.close()


def test_two_journals_have_tags_of_their_own(tmp_path: Path) -> None:
    assert Journal(tmp_path / "a").tag != Journal(tmp_path / "b").tag


def test_nobody_else_may_read_the_journal(path: Path) -> None:
    previous = os.umask(0)
    try:
        journal = Journal(path)
        commit(journal, busy_world())
        assert {f.stat().st_mode & 0o777 for f in path.parent.iterdir()} == {0o600}
        journal.close()
    finally:
        os.umask(previous)


def test_ended_requests_are_found_by_time_and_user(path: Path) -> None:
    journal, world = Journal(path), World()
    world.worker()
    for _ in range(3):
        number = world.admit()
        world.decide()
        world.tick(30)
        world.finish(number)
    commit(journal, world)
    start = World().now.unix_s
    assert [r.id for r in journal.ended(0, float("inf"), None)] == [1, 2, 3]
    assert [r.id for r in journal.ended(start + 45, float("inf"), None)] == [2, 3]
    assert [r.id for r in journal.ended(start + 45, start + 45, None)] == [2]
    assert journal.ended(0, float("inf"), 4711) == []


# --- all or nothing
# -----------------------------------------------------------------------------------------------------


def test_a_batch_that_fails_in_its_middle_leaves_nothing(path: Path) -> None:
    world, journal = busy_world(), Journal(path)
    commit(journal, world)
    before = list(journal.events())
    twin = World(world.state.site)
    twin.state.counters.request_id = 100
    number = twin.admit()
    twin.state.requests[number].submit_key = next(iter(world.state.requests.values())).submit_key
    with pytest.raises(Transient):
        commit(journal, twin, {"f" * 64: b"x"})
    assert list(journal.events()) == before
    assert journal.blob("f" * 64) is None
    assert journal.request(number) is None
    assert all(journal.request(i) for i in (1, 2, 3)), "an acknowledged request went away"
    journal.close()


@pytest.fixture
def files_may_grow(path: Path) -> Iterator[Callable[[int], None]]:
    """Limits how large this process's files may get, as a full disk would."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, previous)


@pytest.mark.parametrize("room", [0, 500, 5_000, 50_000, 120_000])
def test_a_full_disk_is_a_passing_fault_and_costs_nothing_that_was_there(
    path: Path, files_may_grow: Callable[[int], None], room: int
) -> None:
    world, journal = World(), Journal(path)
    number = world.admit()
    commit(journal, world)
    sizes = [f.stat().st_size for f in path.parent.iterdir()]
    files_may_grow(max(sizes) + room)
    for attempt in range(3):
        world.admit()
        with pytest.raises(Transient) as caught:
            for i in range(10):
                commit(journal, world, {f"{attempt:032}{i:032}": b"x" * 40_000})
        assert "journal cannot be written" in caught.value.message
        assert caught.value.exit_code == 75
        on_disk = State(site=world.state.site, tag=journal.tag)
        journal.fill(on_disk)
        assert number in on_disk.requests, "what was acknowledged is readable while the disk is full"
        world.state.touched_requests.clear()
        world.journal.clear()
    files_may_grow(resource.RLIM_INFINITY)
    _, on_disk = journal.close(), reopened(path, world)[1]
    again = World(world.state.site)
    again.state = on_disk
    assert number in on_disk.requests


def test_writing_goes_on_without_hands_once_there_is_room_again(
    path: Path, files_may_grow: Callable[[int], None]
) -> None:
    world, journal = World(), Journal(path)
    commit(journal, world)
    files_may_grow(max(f.stat().st_size for f in path.parent.iterdir()) + 10_000)
    number = world.admit()
    with pytest.raises(Transient):
        commit(journal, world, {"d" * 64: b"x" * 1_000_000})
    files_may_grow(resource.RLIM_INFINITY)
    commit(journal, world, {"d" * 64: b"x" * 1_000_000})
    journal.close()
    assert number in reopened(path, world)[1].requests


def test_a_prune_on_a_full_disk_is_a_passing_fault_too(path: Path, files_may_grow: Callable[[int], None]) -> None:
    journal, world = Journal(path), World()
    world.admit()
    commit(journal, world, {f"{i:064}": b"x" * 50_000 for i in range(20)})
    files_may_grow(10)
    with pytest.raises(Transient):
        journal.prune(2e9)
    files_may_grow(resource.RLIM_INFINITY)
    journal.prune(2e9)
    assert journal.blob(f"{1:064}") is None


@pytest.mark.parametrize("after", [1, 4, 17, 40])
def test_a_killed_broker_has_every_request_that_it_acknowledged(path: Path, after: int) -> None:
    child = subprocess.Popen([sys.executable, str(COMMITTER), str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    acknowledged = []
    for line in child.stdout:
        acknowledged.append(int(line))
        if len(acknowledged) >= after:
            break
    child.kill()
    acknowledged += [int(line) for line in child.stdout.read().split("\n")[:-1]]
    child.wait()
    _, state = reopened(path, World())
    assert set(acknowledged) <= state.requests.keys()
    assert state.counters.request_id in (len(acknowledged), len(acknowledged) + 1)
    journal = Journal(path)
    assert all(journal.blob(f"{i:064x}") == b"x" * 3000 for i in state.requests)
    assert len(list(journal.events())) == len(state.requests)


# --- what cannot be read
# ------------------------------------------------------------------------------------------------


def refused(path: Path, kind: type[PromptTunerError] = PromptTunerError) -> PromptTunerError:
    """Refuses to open, names the file, and leaves it as it was."""
    before = path.read_bytes() if path.exists() else None
    beside = {f.name for f in path.parent.iterdir()}
    with pytest.raises(kind) as caught:
        journal = Journal(path)
        journal.fill(State(site=World().state.site, tag=""))
    assert str(path) in caught.value.message
    assert caught.value.hint
    if before is not None:
        assert path.read_bytes() == before
    assert {f.name for f in path.parent.iterdir()} <= beside | {f"{path.name}-wal", f"{path.name}-shm"}
    return caught.value


@pytest.fixture
def content(path: Path) -> bytes:
    """A closed journal with something in it."""
    journal = Journal(path)
    commit(journal, busy_world(), {"d" * 64: b"x" * 20_000})
    journal.close()
    return path.read_bytes()


def test_an_empty_file_is_no_journal(path: Path) -> None:
    path.touch()
    assert "empty" in refused(path).message
    assert path.stat().st_size == 0


def test_a_journal_whose_main_file_is_gone_is_not_begun_anew(path: Path, content: bytes) -> None:
    path.unlink()
    path.with_name("journal.sqlite-wal").write_bytes(b"x" * 100)
    assert "-wal" in refused(path).message
    assert not path.exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_journal_is_refused(path: Path, content: bytes, share: float) -> None:
    path.write_bytes(content[: int(len(content) * share)])
    refused(path)


def test_something_else_is_refused(path: Path) -> None:
    path.write_bytes(b"#!/bin/sh\necho hello\n" * 500)
    assert ".recover" in refused(path).hint


def test_another_programs_database_is_refused(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE recipes (name TEXT)")
    db.commit()
    db.close()
    refused(path)


def test_a_newer_releases_journal_is_refused_with_both_versions(path: Path, content: bytes) -> None:
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version=7")
    db.close()
    assert "schema 7, this release reads 1" in refused(path, ConfigError).message


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_never_looks_like_a_new_journal(path: Path, content: bytes, where: float, flip: int) -> None:
    tag = b"\xa3tag\xa8"
    start = content.index(tag) + len(tag)
    damaged = bytearray(content)
    damaged[int(where * len(content))] ^= flip
    folder = path.with_name("flipped")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    victim = folder / "journal.sqlite"
    victim.write_bytes(damaged)
    try:
        journal = Journal(victim)
        journal.fill(State(site=World().state.site, tag=""))
        list(journal.events())
        found = journal.tag
        journal.close()
    except PromptTunerError as error:
        assert str(victim) in error.message
    else:
        assert found.encode() == bytes(damaged[start : start + 8])


@pytest.mark.parametrize("obstacle", ["no folder", "a folder", "a file for a folder"])
def test_a_place_that_cannot_hold_a_journal_is_refused_by_name(tmp_path: Path, obstacle: str) -> None:
    path = tmp_path / "state" / "journal.sqlite"
    if obstacle == "a folder":
        path.mkdir(parents=True)
    elif obstacle == "a file for a folder":
        path.parent.touch()
    with pytest.raises(ConfigError) as caught:
        Journal(path)
    assert str(path) in caught.value.message


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder below one that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="pt-journal-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_folder_that_may_not_be_written_is_refused_by_name(public_folder: Path) -> None:
    """In a process of another user, for root may write anywhere."""
    folder = public_folder / "state"
    folder.mkdir(mode=0o555)
    path = folder / "journal.sqlite"
    program = (
        "import os, sys; from pathlib import Path; from broker.store.journal import Journal\n"
        "from broker.protocol.errors import ConfigError\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: Journal(Path(sys.argv[1]))\n"
        "except ConfigError as error: print(error.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert str(path) in done.stdout, done.stderr
    assert list(folder.iterdir()) == []


# --- where it may be
# ----------------------------------------------------------------------------------------------------

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /home rw,relatime shared:2 - nfs4 server:/home rw
31 22 0:41 / /home/local rw - xfs /dev/sdb1 rw
32 22 0:42 / /mnt/my\\040disk rw - lustre mgs:/fs rw
33 22 0:43 / /over rw - ext4 /dev/sdc rw
34 33 0:44 / /over rw - beegfs beegfs rw
35 22 0:45 / /fuse rw - fuse.sshfs host: rw
36 22 0:46 / /homestead rw - ext4 /dev/sdd rw
37 22 0:47 / /données rw - nfs server:/d rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/var/lib/x", "ext4"),
        ("/home/alice", "nfs4"),
        ("/home", "nfs4"),
        ("/home/local/x", "xfs"),
        ("/homestead/x", "ext4"),
        ("/mnt/my disk/x", "lustre"),
        ("/over/x", "beegfs"),
        ("/fuse/x", "fuse.sshfs"),
        ("/données/x", "nfs"),
    ],
)
def test_the_filesystem_of_a_folder_is_its_innermost_and_latest_mount(folder: str, kind: str) -> None:
    assert journal_module.filesystem_of(folder, MOUNTS) == kind


@pytest.mark.parametrize("kind", ["nfs", "lustre", "fuse.sshfs"])
def test_a_network_filesystem_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(journal_module, "filesystem_of", lambda folder, mounts: kind)
    with pytest.raises(ConfigError) as caught:
        Journal(path)
    assert kind in caught.value.message and str(path.parent) in caught.value.message
    assert "state_dir" in caught.value.hint
    assert list(path.parent.iterdir()) == []


# --- forgetting
# ---------------------------------------------------------------------------------------------------------


def test_a_prune_keeps_what_open_and_recent_requests_refer_to(path: Path) -> None:
    world, journal = World(), Journal(path)
    world.worker()

    def digest(letter: str) -> str:
        return letter * 64

    fields: list[dict[str, Any]] = [{"train": digest("1"), "eval": digest("2")}, {"train": digest("3")}]
    old, shared = (world.admit(**f) for f in fields)
    world.decide()
    world.finish(old, result=digest("4"))
    world.finish(shared, result=digest("5"))
    commit(journal, world, {digest(c): c.encode() for c in "123459"})
    world.tick(1000)
    world.apply(events.WorkerHeard(allocation_id=1, rss_mb=1.0))
    world.admit(train=digest("3"))
    recent = world.admit(train=digest("6"))
    world.decide()
    world.finish(recent, result=digest("7"))
    commit(journal, world, {digest(c): c.encode() for c in "367"})
    journal.prune(world.now.unix_s - 500)
    kept = {c for c in "123456789" if journal.blob(digest(c)) is not None}
    assert kept == {"3", "6", "7"}
    assert journal.request(old) is not None, "the record stays"
    journal.prune(world.now.unix_s + 500)
    assert {c for c in "123456789" if journal.blob(digest(c)) is not None} == {"3"}


def test_an_ephemeral_word_alone_writes_nothing(path: Path) -> None:
    world, journal = World(), Journal(path)
    number = world.worker()
    commit(journal, world)
    size = path.with_name("journal.sqlite-wal").stat().st_size
    world.apply(events.WorkerHeard(allocation_id=number, rss_mb=5.0))
    commit(journal, world)
    assert path.with_name("journal.sqlite-wal").stat().st_size == size

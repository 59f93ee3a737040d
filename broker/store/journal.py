"""The journal: every event, and the records that follow from them, in one SQLite file on node-local disk.

One writer. A batch of events, the records they touched and the data they brought are one transaction with
`synchronous=FULL`: when `commit` returns, they are on disk, and the records are what replaying the events would give.
"""

from __future__ import annotations

import os
import re
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, field

from broker.protocol.errors import ConfigError, PromptTunerError, Transient
from broker.protocol.states import AllocationState
from broker.state.events import AnyEvent, event_decoder
from broker.state.model import Allocation, Counters, Learned, PoolHealth, Request, State

SCHEMA = 1
NETWORK_FILESYSTEMS = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "cifs",
    "smb3",
    "ceph",
    "afs",
    "9p",
    "pvfs2",
    "orangefs",
}

_TABLES = """
CREATE TABLE event (seq INTEGER PRIMARY KEY, unix_s REAL NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL);
CREATE TABLE request (
    id INTEGER PRIMARY KEY, submit_key TEXT NOT NULL, uid INTEGER NOT NULL, submit_unix_s REAL NOT NULL,
    end_unix_s REAL NOT NULL, active INTEGER NOT NULL, result TEXT, body BLOB NOT NULL);
CREATE UNIQUE INDEX request_key ON request (submit_key);
CREATE INDEX request_end ON request (end_unix_s);
CREATE INDEX request_active ON request (id) WHERE active;
CREATE TABLE allocation (id INTEGER PRIMARY KEY, active INTEGER NOT NULL, body BLOB NOT NULL);
CREATE TABLE blob (digest TEXT PRIMARY KEY, stored_unix_s REAL NOT NULL, bytes BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE meta (key TEXT PRIMARY KEY, body BLOB NOT NULL);
"""


class Batch(Struct):
    """What one turn of the broker adds."""

    events: list[tuple[float, AnyEvent]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)


class _Meta(Struct, kw_only=True):
    tag: str
    counters: Counters
    learned: dict[str, Learned]
    health: dict[str, PoolHealth]


_OCTAL = re.compile(r"\\([0-7]{3})")  # how mountinfo writes blanks
_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(Request)
_allocation_decoder = msgspec.msgpack.Decoder(Allocation)
_meta_decoder = msgspec.msgpack.Decoder(_Meta)


class Journal:
    """Opens or creates the journal at `path`.

    Raises `ConfigError` on a network filesystem or a file of another release, and `PromptTunerError` on a damaged one:
    it never starts empty in silence.
    """

    def __init__(self, path: Path) -> None:
        _refuse_network_filesystem(path.parent)
        self.path = path
        with self._reading():
            _make_or_find(path)
            self._db = sqlite3.connect(path, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def _prepare(self) -> None:
        db = self._db
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if not version and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise sqlite3.DatabaseError("it is another program's database")
        if version in (0, SCHEMA):
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA cache_size=-8000")
        if not version:
            with self._transaction():
                for statement in _TABLES.split(";"):
                    db.execute(statement)
                self._put_meta(_Meta(tag=secrets.token_hex(4), counters=Counters(), learned={}, health={}))
                db.execute(f"PRAGMA user_version={SCHEMA}")
        elif version != SCHEMA:
            raise ConfigError(
                f"the journal {self.path} has schema {version}, this release reads {SCHEMA}",
                "start the release that wrote it, or move the file away",
            )
        elif (verdict := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(verdict)

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise PromptTunerError(
                f"the journal {self.path} cannot be read: {error}",
                "restore it from a backup (sqlite3 FILE .recover), or move it away to start with nothing",
            ) from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise Transient(
                f"the broker's journal cannot be written: {error}", "try again; tell the site's admin"
            ) from None

    def _rows(self, query: str, values: Sequence[object] = ()) -> Iterator[tuple[Any, ...]]:
        with self._reading():
            yield from self._db.execute(query, values)

    def _put_meta(self, meta: _Meta) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES ('state', ?)", (_encoder.encode(meta),))

    def fill(self, state: State) -> None:
        """Puts everything that has not ended, and what was learned, into a fresh `state`."""
        meta = self._meta()
        state.counters, state.learned, state.health = meta.counters, meta.learned, meta.health
        with self._reading():
            for (body,) in self._rows("SELECT body FROM request WHERE active ORDER BY id"):
                request = _request_decoder.decode(body)
                state.requests[request.id] = request
                state.by_key[request.submit_key] = request.id
            for (body,) in self._rows("SELECT body FROM allocation WHERE active ORDER BY id"):
                allocation = _allocation_decoder.decode(body)
                state.allocations[allocation.id] = allocation

    @property
    def tag(self) -> str:
        """Drawn once, with the file."""
        return self._meta().tag

    def _meta(self) -> _Meta:
        with self._reading():
            for (body,) in self._rows("SELECT body FROM meta WHERE key='state'"):
                return _meta_decoder.decode(body)
            raise sqlite3.DatabaseError("it lacks its tag and counters")

    def commit(self, batch: Batch, state: State) -> None:
        """Makes the batch and every record that it touched durable, all or nothing.

        Raises `Transient` when the disk does not take it; nothing of the batch may be acknowledged then.
        """
        requests, allocations = state.touched_requests.values(), state.touched_allocations.values()
        if not (batch.events or batch.blobs or requests or allocations):
            return
        with self._writing(), self._transaction():
            self._write(batch, requests, allocations)
            self._put_meta(_Meta(tag=state.tag, counters=state.counters, learned=state.learned, health=state.health))
        state.touched_requests.clear()
        state.touched_allocations.clear()

    def _write(self, batch: Batch, requests: Iterable[Request], allocations: Iterable[Allocation]) -> None:
        stored_unix_s = batch.events[-1][0] if batch.events else 0.0
        self._db.executemany(
            "INSERT OR IGNORE INTO blob VALUES (?, ?, ?)",
            [(digest, stored_unix_s, data) for digest, data in batch.blobs.items()],
        )
        self._db.executemany(
            "INSERT INTO event (unix_s, kind, body) VALUES (?, ?, ?)",
            [(unix_s, type(event).__name__, _encoder.encode(event)) for unix_s, event in batch.events],
        )
        self._db.executemany(
            "INSERT INTO request VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
            " end_unix_s=excluded.end_unix_s, active=excluded.active, result=excluded.result, body=excluded.body",
            [
                (
                    r.id,
                    r.submit_key,
                    r.uid,
                    r.submit_unix_s,
                    r.end_unix_s,
                    not r.state.final,
                    r.result,
                    _encoder.encode(r),
                )
                for r in requests
            ],
        )
        self._db.executemany(
            "INSERT OR REPLACE INTO allocation VALUES (?, ?, ?)",
            [(a.id, a.state is not AllocationState.ENDED, _encoder.encode(a)) for a in allocations],
        )

    def request(self, request_id: int) -> Request | None:
        return next(self._requests("SELECT body FROM request WHERE id=?", [request_id]), None)

    def _requests(self, query: str, values: Sequence[object]) -> Iterator[Request]:
        with self._reading():
            for (body,) in self._rows(query, values):
                yield _request_decoder.decode(body)

    def id_of_key(self, submit_key: str) -> int | None:
        """The request that was submitted under this key, ended or not."""
        return next((int(i) for (i,) in self._rows("SELECT id FROM request WHERE submit_key=?", [submit_key])), None)

    def ended(self, start_unix_s: float, end_unix_s: float, uid: int | None) -> list[Request]:
        """Requests that ended after `start_unix_s` and were submitted before `end_unix_s`; of one user, or of all."""
        query = "SELECT body FROM request WHERE NOT active AND end_unix_s >= ? AND submit_unix_s <= ?"
        values: list[float | int] = [start_unix_s, end_unix_s]
        if uid is not None:
            query, values = f"{query} AND uid = ?", [*values, uid]
        return list(self._requests(f"{query} ORDER BY id", values))

    def blob(self, digest: str) -> bytes | None:
        return next((data for (data,) in self._rows("SELECT bytes FROM blob WHERE digest=?", [digest])), None)

    def events(self) -> Iterator[tuple[float, AnyEvent]]:
        """All that happened, in order."""
        with self._reading():
            for unix_s, body in self._rows("SELECT unix_s, body FROM event ORDER BY seq"):
                yield unix_s, event_decoder.decode(body)

    def prune(self, before_unix_s: float) -> None:
        """Forgets data and results that no request which is open or ended after `before_unix_s` refers to.

        Raises `Transient` when the disk does not take it.
        """
        keep: set[str] = set()
        for request in self._requests("SELECT body FROM request WHERE active OR end_unix_s >= ?", [before_unix_s]):
            keep.update(d for d in (request.spec.train, request.spec.eval, request.result) if d)
        stale = [
            (digest,)
            for (digest,) in self._rows("SELECT digest FROM blob WHERE stored_unix_s < ?", [before_unix_s])
            if digest not in keep
        ]
        with self._writing(), self._transaction():
            self._db.executemany("DELETE FROM blob WHERE digest=?", stale)

    def close(self) -> None:
        self._db.close()


class _Transaction:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:  # a COMMIT that failed may leave it open
                self._db.execute("ROLLBACK")


def _make_or_find(path: Path) -> None:
    """Makes the file (0600) if there is none. Raises for one that is empty or whose other half alone is left."""
    log = path.with_name(f"{path.name}-wal")
    try:
        if not path.exists():
            if log.exists():
                raise sqlite3.DatabaseError(f"it is gone, and {log.name} is still there")
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            return
        os.close(os.open(path, os.O_RDWR))
        if path.stat().st_size == 0:
            raise sqlite3.DatabaseError("it is empty")
    except OSError as error:
        raise ConfigError(
            f"the journal {path} cannot be opened: {error.strerror}",
            "set broker.state_dir to a folder on a disk of this host in which the broker may write",
        ) from None


def filesystem_of(folder: str, mounts: str) -> str:
    """The type of the filesystem that holds `folder` (a real path), by the kernel's table of mounts (mountinfo)."""
    kind, longest = "", -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        mount = _OCTAL.sub(lambda code: chr(int(code[1], 8)), before.split()[4])
        inside = folder == mount or folder.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= longest:
            kind, longest = after.split()[0], len(mount)
    return kind


def _refuse_network_filesystem(folder: Path) -> None:
    kind = filesystem_of(os.path.realpath(folder), Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
    if kind in NETWORK_FILESYSTEMS or kind.startswith("fuse."):
        raise ConfigError(
            f"the journal's folder {folder} is on a network filesystem ({kind})",
            "set broker.state_dir to a folder on a disk of this host: SQLite's locks are not safe elsewhere",
        )

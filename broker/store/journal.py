"""The journal: every event, and the records that follow from them, in one SQLite file on node-local disk.

One writer. A batch of events, the records they touched and the data they brought are one transaction with
`synchronous=FULL`: when `commit` returns, they are on disk, and the records are what replaying the events would give.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

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


_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(Request)
_allocation_decoder = msgspec.msgpack.Decoder(Allocation)
_meta_decoder = msgspec.msgpack.Decoder(_Meta)


class Journal:
    """Opens or creates the journal at `path`.

    Raises `ConfigError` on a network filesystem or a file of another release, and `PromptTunerError` on a damaged one: it
    never starts empty in silence.
    """

    def __init__(self, path: Path) -> None:
        _refuse_network_filesystem(path.parent)
        self.path = path
        new = not path.exists()
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None)
        try:
            self._prepare(new)
        except sqlite3.DatabaseError as error:
            raise PromptTunerError(
                f"the journal {path} cannot be read: {error}",
                "restore it from a backup (sqlite3 FILE .recover), or move it away to start with nothing",
            ) from None

    def _prepare(self, new: bool) -> None:
        db = self._db
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA cache_size=-8000")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if not version:
            if not new and self.path.stat().st_size == 0:
                raise sqlite3.DatabaseError("it is empty")
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

    def _put_meta(self, meta: _Meta) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES ('state', ?)", (_encoder.encode(meta),))

    def fill(self, state: State) -> None:
        """Puts everything that has not ended, and what was learned, into a fresh `state`."""
        meta = self._meta()
        state.counters, state.learned, state.health = meta.counters, meta.learned, meta.health
        for (body,) in self._db.execute("SELECT body FROM request WHERE active ORDER BY id"):
            request = _request_decoder.decode(body)
            state.requests[request.id] = request
            state.by_key[request.submit_key] = request.id
        for (body,) in self._db.execute("SELECT body FROM allocation WHERE active ORDER BY id"):
            allocation = _allocation_decoder.decode(body)
            state.allocations[allocation.id] = allocation

    @property
    def tag(self) -> str:
        """Drawn once, with the file."""
        return self._meta().tag

    def _meta(self) -> _Meta:
        return _meta_decoder.decode(self._db.execute("SELECT body FROM meta WHERE key='state'").fetchone()[0])

    def commit(self, batch: Batch, state: State) -> None:
        """Makes the batch and every record that it touched durable, all or nothing.

        Raises `Transient` when the disk does not take it; nothing of the batch may be acknowledged then.
        """
        requests, allocations = state.touched_requests.values(), state.touched_allocations.values()
        if not (batch.events or batch.blobs or requests or allocations):
            return
        try:
            with self._transaction():
                self._write(batch, requests, allocations)
                self._put_meta(
                    _Meta(tag=state.tag, counters=state.counters, learned=state.learned, health=state.health)
                )
        except sqlite3.Error as error:
            raise Transient(
                f"the broker's journal cannot be written: {error}", "try again; tell the site's admin"
            ) from None
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
            "INSERT OR REPLACE INTO request VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
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
        row = self._db.execute("SELECT body FROM request WHERE id=?", (request_id,)).fetchone()
        return _request_decoder.decode(row[0]) if row else None

    def id_of_key(self, submit_key: str) -> int | None:
        """The request that was submitted under this key, ended or not."""
        row = self._db.execute("SELECT id FROM request WHERE submit_key=?", (submit_key,)).fetchone()
        return int(row[0]) if row else None

    def ended(self, start_unix_s: float, end_unix_s: float, uid: int | None) -> list[Request]:
        """Requests that ended after `start_unix_s` and were submitted before `end_unix_s`; of one user, or of all."""
        query = "SELECT body FROM request WHERE NOT active AND end_unix_s >= ? AND submit_unix_s <= ?"
        values: list[float | int] = [start_unix_s, end_unix_s]
        if uid is not None:
            query, values = f"{query} AND uid = ?", [*values, uid]
        return [_request_decoder.decode(body) for (body,) in self._db.execute(f"{query} ORDER BY id", values)]

    def blob(self, digest: str) -> bytes | None:
        row = self._db.execute("SELECT bytes FROM blob WHERE digest=?", (digest,)).fetchone()
        return row[0] if row else None

    def events(self) -> Iterator[tuple[float, AnyEvent]]:
        """All that happened, in order."""
        for unix_s, body in self._db.execute("SELECT unix_s, body FROM event ORDER BY seq"):
            yield unix_s, event_decoder.decode(body)

    def prune(self, before_unix_s: float) -> None:
        """Forgets data and results that no request which is open or ended after `before_unix_s` refers to."""
        keep: set[str] = set()
        for (body,) in self._db.execute("SELECT body FROM request WHERE active OR end_unix_s >= ?", (before_unix_s,)):
            request = _request_decoder.decode(body)
            keep.update(d for d in (request.spec.train, request.spec.eval, request.result) if d)
        stale = [
            (digest,)
            for (digest,) in self._db.execute("SELECT digest FROM blob WHERE stored_unix_s < ?", (before_unix_s,))
            if digest not in keep
        ]
        with self._transaction():
            self._db.executemany("DELETE FROM blob WHERE digest=?", stale)

    def close(self) -> None:
        self._db.close()


class _Transaction:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            return
        self._db.execute("COMMIT")


def _refuse_network_filesystem(folder: Path) -> None:
    real = os.path.realpath(folder)
    kind, longest = "", -1
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].encode().decode("unicode_escape")
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= longest:
            kind, longest = after.split()[0], len(mount)
    if kind in NETWORK_FILESYSTEMS or kind.startswith("fuse."):
        raise ConfigError(
            f"the journal's folder {folder} is on a network filesystem ({kind})",
            "set broker.state_dir to a folder on a disk of this host: SQLite's locks are not safe elsewhere",
        )

"""A user's training and evaluation rows, read as the user and brought into one canonical form.

JSON Lines, or CSV by its name (`.csv`), with `input` and `target`. Every mistake is told with file and line.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from broker.protocol.errors import DataError

MAX_LINE_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_FORM = 'each line is a JSON object such as {"input": "...", "target": "..."}'


class Data(NamedTuple):
    """Rows in canonical JSON Lines: compact, UTF-8, `input` then `target`, one newline after each."""

    canonical: bytes
    digest: str  # SHA-256 of it, in hex
    rows: int
    warnings: list[str]


def read_data(path: Path, max_bytes: int, max_rows: int) -> Data:
    """The rows of `path`; blank lines are left out, and fields other than `input` and `target` (with a warning).

    The file may be a link; it must be a regular file of at most `max_bytes` with at most `max_rows` rows. At no time is
    more of it in memory than its rows and one line. Raises DataError that names file and line.
    """
    reader = _Reader(path, max_bytes)
    parts: list[bytes] = []
    size = 0
    pairs = reader.csv_rows() if path.suffix.lower() == ".csv" else reader.json_rows()
    for source, target in pairs:
        if len(parts) >= max_rows:
            reader.refuse(f"more than {max_rows} rows", "this site takes no more in one request: use fewer rows")
        if not target.strip():
            reader.refuse("the target is empty", "training needs at least one target token in each row")
        row = _canonical(source, target, reader)
        size += len(row)
        if size > max_bytes:
            reader.refuse(*_too_large(max_bytes))
        parts.append(row)
    if not parts:
        raise DataError(f"{path}: no rows", _FORM)
    canonical = b"".join(parts)
    return Data(canonical, hashlib.sha256(canonical).hexdigest(), len(parts), reader.warnings())


def _canonical(source: str, target: str, reader: _Reader) -> bytes:
    text = json.dumps({"input": source, "target": target}, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        reader.refuse("half of a surrogate pair (such as \\ud800)", "write the character itself, in UTF-8")


def _too_large(max_bytes: int) -> tuple[str, str]:
    return f"more than {max_bytes >> 20} MiB of data", "this site takes no more in one request: use fewer rows"


class _Reader:
    """One pass over an open file that always knows its line."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._line = 0
        self._offset = 0  # of the present line, in bytes
        self._unused: dict[str, None] = {}

    def refuse(self, what: str, hint: str = "") -> NoReturn:
        where = f"{self._path}:{self._line}" if self._line else str(self._path)
        raise DataError(f"{where}: {what}", hint)

    def warnings(self) -> list[str]:
        if not self._unused:
            return []
        names = ", ".join(list(self._unused)[:5]) + (", ..." if len(self._unused) > 5 else "")
        return [f"{self._path}: only input and target are used; not used: {names}"]

    def json_rows(self) -> Iterator[tuple[str, str]]:
        for line in self._lines():
            if not line.isspace():
                fields = self._object(line)
                yield self._text(fields, "input"), self._text(fields, "target")
                self._note_unused(fields)

    def _object(self, line: str) -> dict[str, Any]:
        try:
            fields = json.loads(line, object_pairs_hook=self._unique)
        except json.JSONDecodeError as error:
            self.refuse(f"not JSON: {error.msg} (column {error.colno})", _FORM)
        except (RecursionError, ValueError) as error:
            self.refuse(f"not usable JSON: {type(error).__name__}", _FORM)
        if not isinstance(fields, dict):
            self.refuse(f"{_kind(fields)} where an object is due", _FORM)
        return fields

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self.refuse(f"the field {_short(twice)} is there twice", "keep one of them")
        return fields

    def _text(self, fields: dict[str, Any], name: str) -> str:
        value = fields.get(name)
        if isinstance(value, str):
            return value
        if name not in fields:
            found = ", ".join(_short(field) for field in list(fields)[:8]) or "none"
            self.refuse(f"the field '{name}' is missing (there: {found})", _FORM)
        self.refuse(f"the field '{name}' is {_kind(value)} where text is due", "put it in quotes")

    def _note_unused(self, fields: dict[str, Any]) -> None:
        if len(fields) > 2 and len(self._unused) < 6:
            self._unused.update(dict.fromkeys(_short(name) for name in fields if name not in ("input", "target")))

    def csv_rows(self) -> Iterator[tuple[str, str]]:
        import csv

        csv.field_size_limit(MAX_LINE_BYTES)
        rows = csv.reader(self._lines(), strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
            for name in ("input", "target"):
                if header.count(name) != 1:
                    what = "is there twice" if name in header else "is missing"
                    self.refuse(f"the column '{name}' {what} in the header", "it names the columns: input,target")
            source, target = header.index("input"), header.index("target")
            self._unused.update(dict.fromkeys(_short(name) for name in header if name not in ("input", "target")))
            for row in rows:
                if row and len(row) != len(header):
                    what = f"{len(row)} fields where the header has {len(header)}"
                    self.refuse(what, "quote fields that hold commas")
                if row:
                    yield row[source], row[target]
        except csv.Error as error:
            self.refuse(f"not CSV: {error}", "quote fields with double quotes, and double those inside")

    def _lines(self) -> Iterator[str]:
        """The decoded lines; one that is too long is refused before it is read whole."""
        try:
            # Without O_NONBLOCK the opening of a pipe would wait for its other end.
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "its name has a NUL character"
            raise DataError(f"{self._path}: cannot be read: {reason}", "check its name and permissions") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            self.refuse("not a regular file", "name a file of JSON Lines or CSV; a pipe or folder cannot be used")
        with open(descriptor, "rb") as file:
            try:
                while line := file.readline(MAX_LINE_BYTES + 1):
                    self._line += 1
                    if self._offset > self._max_bytes:
                        self.refuse(*_too_large(self._max_bytes))
                    yield self._decoded(line)
                    self._offset += len(line)
            except OSError as error:
                self.refuse(f"cannot be read further: {error.strerror}")

    def _decoded(self, line: bytes) -> str:
        if len(line) > MAX_LINE_BYTES:
            self.refuse(f"a line longer than {MAX_LINE_BYTES >> 20} MiB", "one row stands on each line")
        if self._offset == 0 and line.startswith(_BOM):
            line, skipped = line[len(_BOM) :], len(_BOM)
        else:
            skipped = 0
        nul = line.find(b"\0")
        if nul >= 0:
            self.refuse(f"a NUL byte (byte {self._offset + skipped + nul} of the file)", "this is no text file")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            at = self._offset + skipped + error.start
            self.refuse(f"not UTF-8: byte {at} of the file is 0x{line[error.start]:02x}", "save the file as UTF-8")


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def _short(name: str) -> str:
    return repr(name if len(name) <= 40 else name[:37] + "...")

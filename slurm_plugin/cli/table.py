"""Tables in the manner of squeue (`-o "%.12i %R"`, `-O Field:20`) and of sacct (`-o Field%30`).

A format is read once into columns; then each column is a list of cells and each row one `%` of a ready template, so
that ten thousand rows cost some tens of milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from broker.protocol.errors import UsageError
from slurm_plugin.cli.common import printable

R = TypeVar("R")

_SPEC = r"(?s)%(\.)?([0-9]{0,4})([A-Za-z])|%(.?)"
_NAMED_SPEC = r"([A-Za-z]+)(?:%(-)?([0-9]{1,4}))?"
_LONG_SPEC = r"([A-Za-z]+)(?::(\.)?([0-9]{0,4}))?"
_LONG_WIDTH = 20


class Field(NamedTuple, Generic[R]):
    """One thing that a table can show of a row."""

    name: str  # as sacct and -O have it
    header: str  # as squeue has it
    width: int
    cell: Callable[[R, float], str]  # of a row and the present time
    letter: str = ""
    key: Callable[[R], Any] | None = None  # what to sort by, where it is not the cell
    left: bool = False  # in sacct's tables


class Column(NamedTuple, Generic[R]):
    """A field as one table shows it. A width of 0 takes as much as is needed."""

    field: Field[R]
    width: int
    right: bool


class Table(NamedTuple, Generic[R]):
    """Columns and the literal text before each and after the last."""

    columns: Sequence[Column[R]]
    literals: Sequence[str]

    def lines(self, rows: Iterable[R], now_unix_s: float, header: bool = True) -> list[str]:
        """The table's lines, cells cut at their widths as squeue cuts them; control characters become `?`."""
        template = self.literals[0]
        for column, literal in zip(self.columns, self.literals[1:], strict=True):
            template += _slot(column.width, column.right) + literal
        cells = self._cells(rows, now_unix_s)
        lines = [line if line.isprintable() else printable(line) for line in map(template.__mod__, cells)]
        return [template % tuple(column.field.header for column in self.columns), *lines] if header else lines

    def accounting_lines(self, rows: Iterable[R], now_unix_s: float, header: bool = True) -> list[str]:
        """As sacct prints: a rule under the header, and a `+` at the end of a cell that was cut."""
        heads = tuple(column.field.name for column in self.columns)
        lines = [" ".join("-" * column.width for column in self.columns)] if header else []
        widths = [(column.width, column.right) for column in self.columns]
        for cells in (*([heads] if header else []), *self._cells(rows, now_unix_s)):
            lines.append(" ".join(_cut(cell, width, right) for cell, (width, right) in zip(cells, widths, strict=True)))
        if header:
            lines[0], lines[1] = lines[1], lines[0]
        return [printable(line) for line in lines]

    def delimited_lines(self, rows: Iterable[R], now_unix_s: float, delimiter: str, header: bool = True) -> list[str]:
        """Whole cells with `delimiter` between them; one inside a cell becomes `?`, so that no field can shift."""
        heads = [delimiter.join(column.field.name for column in self.columns)] if header else []
        return heads + [
            delimiter.join(printable(cell).replace(delimiter, "?") for cell in cells)
            for cells in self._cells(rows, now_unix_s)
        ]

    def _cells(self, rows: Iterable[R], now_unix_s: float) -> Iterable[tuple[str, ...]]:
        rows = list(rows)
        return zip(*([column.field.cell(row, now_unix_s) for row in rows] for column in self.columns), strict=True)


def _slot(width: int, right: bool) -> str:
    if not width:
        return "%s"
    return f"%{width}.{width}s" if right else f"%-{width}.{width}s"


def _cut(cell: str, width: int, right: bool) -> str:
    if len(cell) > width:
        cell = cell[: width - 1] + "+"
    return cell.rjust(width) if right else cell.ljust(width)


def letter_format(text: str, fields: Sequence[Field[R]]) -> Table[R]:
    """The table of squeue's `-o`: `%[[.]size]letter` and literal text. `.` sets to the right.

    Raises UsageError for an unknown letter, with the known ones.
    """
    known = {field.letter: field for field in fields if field.letter}
    columns: list[Column[R]] = []
    literals, start = [""], 0
    for match in re.finditer(_SPEC, text):
        literals[-1] += _literal(text[start : match.start()])
        start = match.end()
        if match[4] == "%":
            literals[-1] += "%%"
            continue
        if match[3] is None or match[3] not in known:
            listed = "  ".join(f"%{field.letter} {field.header}" for field in fields if field.letter)
            raise UsageError(f"unknown format field {match[0]!r} in {text[:80]!r}", f"known: {listed}")
        columns.append(Column(known[match[3]], int(match[2] or 0), bool(match[1])))
        literals.append("")
    literals[-1] += _literal(text[start:])
    if not columns:
        raise UsageError(f"no field in the format {text[:80]!r}", "for instance: -o '%i %j %t'")
    return Table(columns, literals)


def _literal(text: str) -> str:
    return text.replace("%", "%%")


def long_format(text: str, fields: Sequence[Field[R]]) -> Table[R]:
    """The table of squeue's `-O`: `Field[:[.][size]],...`; 20 wide where no size is given."""
    columns = []
    for word in text.split(","):
        match = re.fullmatch(_LONG_SPEC, word.strip())
        field = _named(match[1], fields) if match else None
        if match is None or field is None:
            raise _unknown(word, fields)
        columns.append(Column(field, int(match[3] or _LONG_WIDTH), bool(match[2])))
    return Table(columns, [""] * (len(columns) + 1))


def named_format(text: str, fields: Sequence[Field[R]]) -> Table[R]:
    """The table of sacct's `-o`: `Field[%[-]size],...`; a minus sets to the left."""
    columns = []
    for word in text.split(","):
        match = re.fullmatch(_NAMED_SPEC, word.strip())
        field = _named(match[1], fields) if match else None
        if match is None or field is None:
            raise _unknown(word, fields)
        right = not match[2] if match[3] else not field.left
        columns.append(Column(field, int(match[3] or field.width) or field.width, right))
    return Table(columns, [""] * (len(columns) + 1))


def _named(name: str, fields: Sequence[Field[R]]) -> Field[R] | None:
    return next((field for field in fields if field.name.lower() == name.lower()), None)


def _unknown(word: str, fields: Sequence[Field[R]]) -> UsageError:
    return UsageError(f"unknown field {word.strip()[:60]!r}", f"known: {', '.join(field.name for field in fields)}")


def sort_rows(rows: list[R], spec: str, fields: Sequence[Field[R]], now_unix_s: float) -> None:
    """Sorts in place by squeue's `-S`: letters or names separated by commas, each with `-` before it for downwards."""
    by_letter: Mapping[str, Field[R]] = {field.letter: field for field in fields if field.letter}
    for word in reversed(spec.split(",")):
        name = word.strip().lstrip("+-")
        field = by_letter.get(name) or _named(name, fields)
        if field is None:
            raise _unknown(word, fields)
        rows.sort(key=_sort_key(field, now_unix_s), reverse=word.strip().startswith("-"))


def _sort_key(field: Field[R], now_unix_s: float) -> Callable[[R], Any]:
    if field.key is not None:
        return field.key
    cell = field.cell
    return lambda row: cell(row, now_unix_s)


def emit(lines: list[str]) -> None:
    """Prints the lines in one write."""
    import sys

    if lines:
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()

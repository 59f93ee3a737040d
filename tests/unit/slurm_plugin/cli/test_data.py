"""Reading a user's rows: one canonical form, and every mistake with its file and line."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol.errors import DataError
from slurm_plugin.cli.data import MAX_LINE_BYTES, Data, read_data

MIB = 1 << 20
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(content: bytes | str, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def read(path: Path, max_bytes: int = 16 * MIB, max_rows: int = 1000) -> Data:
    return read_data(path, max_bytes, max_rows)


ONE = b'{"input":"a","target":"b"}\n'


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b'{"input": "a", "target": "b"}', "x.jsonl"),
        (b'{"target":"b","input":"a"}\n\n  \n', "x.jsonl"),
        (b'\xef\xbb\xbf{"input":"a","target":"b"}\r\n', "x.txt"),
        (b'{"input":"\\u0061","target":"b"}\n', "x"),
        (b"input,target\na,b\n", "x.csv"),
        (b'\xef\xbb\xbftarget,input\r\n"b","a"\r\n\r\n', "x.CSV"),
    ],
)
def test_the_same_rows_have_the_same_form_and_digest(write: Write, content: bytes, name: str) -> None:
    data = read(write(content, name))
    assert (data.canonical, data.rows, data.warnings) == (ONE, 1, [])
    assert data.digest == sha256(ONE).hexdigest()


@given(st.lists(st.tuples(st.text(), st.text().filter(str.strip)), min_size=1, max_size=5))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    rows = [(a.encode("utf-8", "ignore").decode(), b.encode("utf-8", "ignore").decode() or "x") for a, b in rows]
    rows = [(a, b if b.strip() else "x") for a, b in rows]
    path = tmp_path_factory.mktemp("rows") / "x.jsonl"
    path.write_text("".join(json.dumps({"input": a, "target": b}) + "\n" for a, b in rows))
    data = read(path)
    found = [json.loads(line) for line in data.canonical.decode().split("\n")[:-1]]
    assert found == [{"input": a, "target": b} for a, b in rows]


def test_fields_that_are_not_used_are_told_once(write: Write) -> None:
    data = read(write('{"input":"a","target":"b","label":1}\n{"input":"c","target":"d","id":2,"label":3}\n'))
    assert data.rows == 2
    assert len(data.warnings) == 1 and "'label', 'id'" in data.warnings[0]


def test_a_quoted_csv_field_may_span_lines(write: Write) -> None:
    data = read(write('input,target,extra\n"a\nb","say ""hi""",x\n', "x.csv"))
    assert json.loads(data.canonical) == {"input": "a\nb", "target": 'say "hi"'}


def test_a_link_of_ones_own_is_followed(write: Write, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(write(ONE))
    assert read(tmp_path / "link").rows == 1


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        (b"", "", "no rows"),
        (b"\n\n", "", "no rows"),
        (ONE + b'{"input":"a"}', ":2", "the field 'target' is missing (there: 'input')"),
        (b'{"text":"a","target":"b"}', ":1", "the field 'input' is missing"),
        (ONE + b"\n" + b'{"input":"a","target":5}', ":3", "the field 'target' is a number where text is due"),
        (b'{"input":null,"target":"b"}', ":1", "the field 'input' is null where text is due"),
        (b'{"input":"a","target":["b"]}', ":1", "the field 'target' is a list where text is due"),
        (b'{"input":"a","target":""}', ":1", "the target is empty"),
        (b'{"input":"a","target":" \\n"}', ":1", "the target is empty"),
        (b'{"input":"a","input":"c","target":"b"}', ":1", "the field 'input' is there twice"),
        (b'{"input":"a","target":"b"', ":1", "not JSON: Expecting ',' delimiter (column 26)"),
        (b"input\ttarget\n", ":1", "not JSON"),
        (b'["a","b"]', ":1", "a list where an object is due"),
        (b'"text"', ":1", "text where an object is due"),
        (b"[" * 200_000, ":1", "not usable JSON: RecursionError"),
        (b'{"n":' + b"1" * 5000 + b"}", ":1", "not usable JSON: ValueError"),
        (b'{"input":"\\ud800","target":"b"}', ":1", "half of a surrogate pair"),
        (ONE + b'{"input":"\xff"}', ":2", "not UTF-8: byte 37 of the file is 0xff"),
        (b"\xef\xbb\xbf" + ONE + b'{"input":"\xff"}', ":2", "not UTF-8: byte 40 of the file is 0xff"),
        ('{"input":"a"}'.encode("utf-16"), ":1", "a NUL byte (byte 3 of the file)"),
        (ONE + b"\0\0", ":2", "a NUL byte (byte 27 of the file)"),
        (ONE + b'{"input":"' + b"x" * MAX_LINE_BYTES, ":2", "a line longer than 1 MiB"),
    ],
)
def test_json_lines_that_cannot_be_used_are_told_by_line(
    write: Write, content: bytes, where: str, message: str
) -> None:
    path = write(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.message.startswith(f"{path}{where}: ")
    assert message in caught.value.message
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        (b"", ":0", "the column 'input' is missing"),
        (b"input,output\na,b\n", ":1", "the column 'target' is missing in the header"),
        (b"input,target,input\n", ":1", "the column 'input' is there twice"),
        (b"input,target\n", "", "no rows"),
        (b"input,target\na,b\nc\n", ":3", "1 fields where the header has 2"),
        (b"input,target\na,b,c\n", ":2", "3 fields where the header has 2"),
        (b"input,target\na,\n", ":2", "the target is empty"),
        (b'input,target\n"a,b\n', ":2", "not CSV: unexpected end of data"),
        (b'input,target\n"a"x,b\n', ":2", "not CSV"),
        (b"input,target\na,\xff\n", ":2", "not UTF-8: byte 15 of the file"),
    ],
)
def test_csv_that_cannot_be_used_is_told_by_line(write: Write, content: bytes, where: str, message: str) -> None:
    path = write(content, "rows.csv")
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.message.startswith(f"{path}{where.replace(':0', '')}: ")
    assert message in caught.value.message


def test_a_line_of_100_mb_is_refused_without_reading_it(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"x" * MIB)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"huge\.jsonl:1: a line longer than 1 MiB"):
        read(path, max_bytes=1 << 40)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024  # KiB


def test_too_much_data_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:4: more than 3 rows"):
        read(write(ONE * 10), max_rows=3)
    big = b'{"input":"' + b"x" * 1000 + b'","target":"b"}\n'
    with pytest.raises(DataError, match="more than 1 MiB of data"):
        read(write(big * 1100), max_bytes=MIB, max_rows=10_000)
    unused = b'{"input":"a","target":"b","note":"' + b"x" * 1000 + b'"}\n'
    with pytest.raises(DataError, match="more than 1 MiB of data"):
        read(write(unused * 1100), max_bytes=MIB, max_rows=10_000)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(DataError, match="not a regular file"):
            read(path)
    with pytest.raises(DataError, match="cannot be read: No such file or directory"):
        read(tmp_path / "none")
    with pytest.raises(DataError, match="NUL character"):
        read(tmp_path / "a\0b")

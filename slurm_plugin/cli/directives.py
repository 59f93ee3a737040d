"""Options in a script: `#PT` lines, and `#SBATCH` lines, read as sbatch reads its own.

Literal (nothing is expanded), until the first line that is neither comment nor blank, in the first 32 KiB. A script has
no other meaning here: nothing of it is run, so a line that would be a command is refused.
"""

from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from broker.protocol.errors import UsageError

HEAD_BYTES = 32 * 1024
MAX_SCRIPT_BYTES = 4 << 20
_PREFIXES = ("#PT", "#SBATCH")


class Directive(NamedTuple):
    """The words of one line, and where it stands."""

    prefix: str  # "#PT" or "#SBATCH"
    words: list[str]
    where: str  # "job.sh:3"


def read_script(name: str) -> list[Directive]:
    """The directives of the script `name` (`-`: standard input), in their order.

    Raises UsageError, in sbatch's words where it has some, for what is no script or would need to be run.
    """
    shown = "standard input" if name == "-" else name
    raw = _read(name, shown)
    first = raw.partition(b"\n")[0]
    if not first.startswith(b"#!"):
        raise UsageError(
            f"{shown}: this does not look like a batch script",
            "the first line must start with #! followed by the path to an interpreter",
        )
    if b"\r\n" in raw:
        raise UsageError(
            f"{shown}: batch script contains DOS line breaks (\\r\\n) instead of expected UNIX line breaks (\\n)",
            "convert it, for instance with dos2unix",
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown}: not UTF-8: byte {error.start}", "save the script as UTF-8") from None
    return _directives(text, shown)


def _read(name: str, shown: str) -> bytes:
    try:
        if name == "-":
            raw = sys.stdin.buffer.read(MAX_SCRIPT_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                raw = file.read(MAX_SCRIPT_BYTES + 1)
    except OSError as error:
        raise UsageError(f"unable to open file {shown}: {error.strerror}") from None
    if len(raw) > MAX_SCRIPT_BYTES:
        raise UsageError(f"{shown}: larger than {MAX_SCRIPT_BYTES >> 20} MiB", "a script holds directives only")
    return raw


def _directives(text: str, shown: str) -> list[Directive]:
    found = []
    offset = 0
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{shown}:{number}"
        if line.strip() and not line.lstrip().startswith("#"):
            raise UsageError(
                f"{where}: a command, and ptbatch runs none: {line.strip()[:60]!r}",
                "a script holds #PT lines only; use sbatch to run commands",
            )
        prefix = next((prefix for prefix in _PREFIXES if _starts(line, prefix)), None)
        if prefix and offset >= HEAD_BYTES:
            raise UsageError(f"{where}: {prefix} after the first {HEAD_BYTES >> 10} KiB is not read", "move it up")
        if prefix:
            found.append(Directive(prefix, _words(line[len(prefix) :], where), where))
        offset += len(line.encode()) + 1
    return found


def _starts(line: str, prefix: str) -> bool:
    return line.startswith(prefix) and line[len(prefix) : len(prefix) + 1] in ("", " ", "\t")


def _words(text: str, where: str) -> list[str]:
    """Words with quotes and backslashes as the shell has them; a word that begins with `#` begins a comment."""
    stream = io.StringIO(text)
    lexer = shlex.shlex(stream, posix=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    try:
        while (rest := text[stream.tell() :].lstrip()) and not rest.startswith("#"):
            word = lexer.get_token()
            if word is None:
                break
            words.append(word)
    except ValueError as error:
        raise UsageError(f"{where}: {error}".replace("No closing quotation", "a quote is not closed")) from None
    return words

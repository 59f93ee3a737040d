"""Following one request to its end, with its progress on stderr, and bringing its result home."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from broker.protocol.errors import NotFound
from broker.protocol.messages import Fetch, FetchReply, Watch
from broker.protocol.rows import RequestRow
from broker.protocol.states import RequestState
from broker.protocol.times import format_duration, format_instant
from slurm_plugin.cli.common import expect, printable, say
from slurm_plugin.cli.fields import error_text, number, slack_text
from slurm_plugin.cli.results import write_folder

if TYPE_CHECKING:
    from broker.net.client import BrokerClient

LINE_EVERY_S = 5.0
FETCH_TIMEOUT_S = 60.0


class Progress:
    """Progress on stderr: one line that changes on a terminal, else a line now and then and at each change of state."""

    def __init__(self, name: str, quiet: bool = False) -> None:
        self.name = name
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._open = False  # a live line stands without its newline
        self._said: tuple[str, str] | None = None
        self._next_mono_s = 0.0

    def show(self, row: RequestRow) -> None:
        if self._quiet or row.state.final:
            return
        if self._live:
            width = max(20, shutil.get_terminal_size().columns - 1)
            sys.stderr.write("\r\x1b[K" + printable(f"{self.name}: {progress_text(row)}")[:width])
            sys.stderr.flush()
            self._open = True
            return
        now = time.monotonic()
        kind = (row.state.value, row.reason)
        if kind != self._said or now >= self._next_mono_s:
            self._said, self._next_mono_s = kind, now + LINE_EVERY_S
            say(self.name, progress_text(row))

    def close(self) -> None:
        """Ends the live line, if one stands."""
        if self._open:
            sys.stderr.write("\n")
            sys.stderr.flush()
            self._open = False


def progress_text(row: RequestRow) -> str:
    """Where a request stands, in one line."""
    text = f"request {row.id} {row.state.value}"
    if row.state is RequestState.PENDING:
        text += f" ({row.reason})"
    else:
        text += f" step {row.step}/{row.max_steps}"
        if row.loss is not None:
            text += f" loss {number(row.loss)}"
        if row.score is not None and row.metric != "loss":
            text += f" {row.metric} {number(row.score)}"
        if row.target_score is not None:
            text += f" (target {number(row.target_score)})"
    if row.predicted_finish_unix_s:
        text += f", finish {format_instant(row.predicted_finish_unix_s)}"
    if row.slack_s is not None:
        text += f", slack {slack_text(row.slack_s)}"
    return text


def summary_text(row: RequestRow) -> str:
    """How a request ended, in one line."""
    text = f"request {row.id} {row.state.value}"
    if row.end_unix_s:
        text += f" after {format_duration(row.end_unix_s - row.submit_unix_s)}, {row.step} steps"
    if row.loss is not None:
        text += f", loss {number(row.loss)}"
    if row.score is not None and row.metric != "loss":
        text += f", {row.metric} {number(row.score)}"
    if row.met is not None:
        text += f", deadline {'met' if row.met else 'missed'}"
        text += f" (slack {slack_text(row.slack_s)})"
    return text + (f": {error_text(row)}" if row.error else "")


def follow(client: BrokerClient, request_id: int, progress: Progress) -> RequestRow:
    """The request as it ended.

    Interrupted by the user, it says that the request goes on, and lets the interrupt through.
    """
    try:
        for update in client.stream(Watch(ids=[request_id])):
            if update.row.id != request_id:
                continue
            progress.show(update.row)
            if update.row.state.final:
                return update.row
    except KeyboardInterrupt:
        progress.close()
        hint = f"ptattach {request_id} follows it, ptcancel {request_id} ends it"
        say(progress.name, f"request {request_id} goes on: {hint}")
        raise
    finally:
        progress.close()
    raise NotFound(f"request {request_id} is not known to the broker", "ptqueue and ptacct list yours")


def fetch(client: BrokerClient, request_id: int, folder: Path) -> int:
    """Writes the result of an ended request into `folder` and returns the number of its files."""
    reply = expect(client.call(Fetch(id=request_id), timeout_s=FETCH_TIMEOUT_S), FetchReply)
    write_folder(reply.files, folder)
    return len(reply.files)


def report_end(name: str, row: RequestRow, quiet: bool = False) -> int:
    """Says how the request ended and returns the exit code for it: 0 only when it completed."""
    if row.state is RequestState.COMPLETED:
        if not quiet:
            say(name, summary_text(row))
        return 0
    say(name, f"error: {summary_text(row)}")
    return 1

"""A broker of canned answers on a real socket, and the commands called as a shell calls them."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from click.testing import CliRunner, Result

from broker.protocol.messages import Message, client_request_decoder, pack, unpack
from broker.protocol.rows import RequestRow
from broker.protocol.states import RequestState

Answer = Callable[[Any], Message | list[Message] | None]


class CannedBroker:
    """A ROUTER in a thread that decodes what it gets and answers what the test says."""

    def __init__(self, address: str) -> None:
        self.heard: list[Any] = []
        self.answer: Answer = lambda message: None
        self._stopped = threading.Event()
        self._router = zmq.Context.instance().socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.bind(address)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stopped.is_set():
            if not self._router.poll(20):
                continue
            peer, *frames = self._router.recv_multipart()
            message = unpack(frames, client_request_decoder)
            self.heard.append(message)
            replies = self.answer(message)
            for reply in replies if isinstance(replies, list) else [replies]:
                if reply is not None:
                    self._router.send_multipart([peer, *pack(reply)])
        self._router.close()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=10)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home with a short path (a socket's has a limit), no site file, no environment that sets options."""
    folder = Path(tempfile.mkdtemp(prefix="pt", dir="/tmp"))
    for name in list(os.environ):
        if name.startswith(("PT", "PROMPTTUNER_", "SLURM_", "SBATCH_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("PROMPTTUNER_RUN_DIR", str(folder / "run"))
    monkeypatch.setenv("PROMPTTUNER_CONF_DIR", str(folder / "conf"))
    monkeypatch.chdir(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def broker(home: Path) -> Iterator[CannedBroker]:
    (home / "run").mkdir(mode=0o700)
    served = CannedBroker(f"ipc://{home}/run/broker.sock")
    yield served
    served.stop()


@pytest.fixture
def run() -> Callable[..., Result]:
    return _run


@pytest.fixture
def row() -> Callable[..., RequestRow]:
    return _row


def _run(name: str, *args: str, input: str | bytes | None = None, env: dict[str, str] | None = None) -> Result:
    """One call of a command in this process, with its own stdout, stderr and exit code."""
    command = importlib.import_module(f"slurm_plugin.cli.{name}").main
    return CliRunner().invoke(command, list(args), prog_name=name, input=input, env=env, catch_exceptions=False)


_ROW = RequestRow(
    id=7,
    job_name="prompt",
    model="tiny",
    pool="tiny",
    partition="local",
    uid=1001,
    user="alice",
    account="teama",
    qos="normal",
    state=RequestState.RUNNING,
    reason="None",
    submit_unix_s=1000.0,
    deadline_unix_s=0.0,
    predicted_finish_unix_s=0.0,
    start_unix_s=1001.0,
    first_step_unix_s=1001.5,
    end_unix_s=0.0,
    step=35,
    max_steps=250,
    loss=0.25,
    score=0.25,
    metric="loss",
    target_score=None,
    start="bank:0123456789abcdef",
    lookup_s=0.01,
    gpu_s=1.5,
    attempts=1,
    allocation="pt-tiny-1-ab",
    job_id="57",
    nodes="node1",
    step_id="57.3",
    comment="",
    error="",
    exit_code=0,
    cancelled_by=None,
    virtual_tokens=16,
    batch_size=8,
    seed=0,
)


def _row(**changes: Any) -> RequestRow:
    """A request as listings see it, with these changes."""
    return msgspec.structs.replace(_ROW, **changes)

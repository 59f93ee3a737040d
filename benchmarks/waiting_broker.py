"""A real broker on a cluster whose queue is full: every allocation that it orders stays pending, so that requests wait
and no training competes with what is measured. Run as a script it is that broker's daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from broker.allocations import Account, AllocationOrder, JobReport, JobState
from broker.net.client import BrokerClient
from broker.protocol.errors import BrokerUnreachable
from broker.protocol.messages import Info, InfoReply
from slurm_plugin.brokerd import build, site_of
from slurm_plugin.contact import find_contact

MODEL = Path(__file__).resolve().parent.parent / "examples" / "small_world" / "tiny"


class FullCluster:
    """An AllocationProvider whose jobs never start."""

    name = "full"

    def __init__(self) -> None:
        self._jobs: dict[str, str] = {}

    def submit(self, order: AllocationOrder) -> str:
        return self._jobs.setdefault(order.name, str(len(self._jobs) + 1))

    def cancel(self, job_ids: Sequence[str]) -> None:
        self._jobs = {name: job for name, job in self._jobs.items() if job not in job_ids}

    def poll(self) -> list[JobReport]:
        return [JobReport(name=n, job_id=j, state=JobState.PENDING, reason="Resources") for n, j in self._jobs.items()]

    def accounts(self) -> dict[str, Account] | None:
        return None


class WaitingBroker:
    """The daemon's process."""

    def __init__(self, folder: str) -> None:
        os.environ["PROMPTTUNER_RUN_DIR"] = f"{folder}/run"
        os.environ["PROMPTTUNER_STATE_DIR"] = f"{folder}/state"
        os.environ["PROMPTTUNER_CONF_DIR"] = folder
        self.contact, _ = find_contact()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Seconds until it answers."""
        began_mono_s = time.monotonic()
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.DEVNULL)
        while time.monotonic() < began_mono_s + 60:
            try:
                self.info()
                return time.monotonic() - began_mono_s
            except BrokerUnreachable:
                time.sleep(0.01)
        raise SystemExit("the broker did not start")

    def info(self) -> InfoReply:
        with BrokerClient(self.contact) as client:
            reply = client.call(Info(), timeout_s=30)
        assert isinstance(reply, InfoReply)
        return reply

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@contextmanager
def waiting_broker() -> Iterator[WaitingBroker]:
    """A broker in a folder of its own, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="pt-bench-") as folder:
        broker = WaitingBroker(folder)
        broker.start()
        try:
            yield broker
        finally:
            broker.kill()


if __name__ == "__main__":
    os.umask(0o077)
    (Path(os.environ["PROMPTTUNER_STATE_DIR"])).mkdir(mode=0o700, parents=True, exist_ok=True)
    daemon = build(site_of(None, [f"tiny={MODEL}"], 1), provider=FullCluster())
    signal.signal(signal.SIGTERM, lambda *_: daemon.stop())
    daemon.run()

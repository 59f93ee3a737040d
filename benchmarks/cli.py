"""Wall time of login-node commands beside bare Python, and the broker's memory with ten thousand requests waiting."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import emit, options
from benchmarks.submit import submissions
from benchmarks.waiting_broker import WaitingBroker, waiting_broker
from broker.net.client import BrokerClient
from broker.protocol.messages import Submitted

BIN = Path(sys.executable).parent
HEAVY = ("torch", "numpy", "jinja2", "transformers", "peft", "tenacity")


def fill(broker: WaitingBroker, count: int) -> None:
    """Submits `count` requests, many of them under way at a time."""
    with BrokerClient(broker.contact) as client:
        answered = 0
        for number, submit in enumerate(submissions(0, count, time.time() + 86400)):
            client.send(submit)
            while number - answered > 200 or (number == count - 1 and answered < count):
                reply = client.receive(30)
                assert isinstance(reply, Submitted), reply
                answered += 1


def wall_ms(command: list[str]) -> float:
    began_s = time.perf_counter()
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return 1000 * (time.perf_counter() - began_s)


def heavy_imports(command: list[str]) -> list[str]:
    """Which libraries that no login node needs the command imports."""
    listing = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in listing.stderr.splitlines()}
    return sorted(imported & set(HEAVY))


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=21)
    given = parser.parse_args()
    commands = {
        "python_ms": [sys.executable, "-c", "pass"],
        "ptbatch_help_ms": [str(BIN / "ptbatch"), "--help"],
        "ptqueue_ms": [str(BIN / "ptqueue")],
        "ptqueue_me_10_ms": [str(BIN / "ptqueue"), "--jobs=1,2,3,4,5,6,7,8,9,10"],
    }
    with waiting_broker() as broker:
        fill(broker, given.requests)
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(given.runs):
            for name, command in commands.items():
                times[name].append(wall_ms(command))
        info = broker.info()
        lines = subprocess.run([str(BIN / "ptqueue"), "-h"], capture_output=True, text=True, check=True).stdout.count(
            "\n"
        )
        heavy = sorted({h for name, c in commands.items() if name != "python_ms" for h in heavy_imports(c)})
    figures = {
        **{name: statistics.median(values) for name, values in times.items()},
        "broker_rss_mb": info.rss_mb,
        "requests_held": info.active_requests,
        "ptqueue_lines": lines,
        "heavy_imports": heavy,
    }
    emit("cli", figures, given.runs, given.json)


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "80")
    main()

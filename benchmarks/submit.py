"""Submissions a second, each of them durable before it is acknowledged; and what a kill -9 in the middle loses.

Eight client processes, one submission after the other as `ptbatch` sends it, against one broker whose requests all
wait: no training competes for this machine's cores.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import statistics
import sys
import time
import uuid
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import emit, options
from benchmarks.waiting_broker import WaitingBroker, waiting_broker
from broker.net.client import BrokerClient, Contact
from broker.protocol.messages import Accounting, Requests, Submit, Submitted
from broker.protocol.spec import RequestSpec

CLIENTS = 8
RESEND_S = 1.0
ROWS = 32


def submissions(client: int, count: int, deadline_unix_s: float) -> list[Submit]:
    """`count` requests with data of their own, ROWS rows each."""
    made = []
    for number in range(count):
        lines = (f'{{"input":"read {client} {number} {i} a b c write","target":"x y z"}}\n' for i in range(ROWS))
        data = "".join(lines).encode()
        digest = hashlib.sha256(data).hexdigest()
        spec = RequestSpec(model="tiny", train=digest, deadline_unix_s=deadline_unix_s + number)
        made.append(Submit(spec=spec, submit_key=uuid.uuid4().hex, blobs={digest: data}))
    return made


def submit_all(contact: Contact, client: int, count: int, gate: Any, acked: Any, out: Queue[Any]) -> None:
    """One client process: one submission after the other, each acknowledged before the next."""
    waiting = submissions(client, count, time.time() + 3600)
    latencies_s: list[float] = []
    ids: list[int] = []
    gate.wait()
    with BrokerClient(contact) as broker:
        for submit in waiting:
            began_mono_s = time.monotonic()
            ids.append(acknowledged(broker, submit))
            latencies_s.append(time.monotonic() - began_mono_s)
            with acked.get_lock():
                acked.value += 1
    out.put((ids, latencies_s))


def acknowledged(broker: BrokerClient, submit: Submit) -> int:
    """Sends `submit` and returns its id, through a restart of the broker if need be: sent again under the same key."""
    while True:
        broker.send(submit)
        reply = broker.receive(RESEND_S)
        if isinstance(reply, Submitted):
            return reply.id
        if reply is not None:
            raise SystemExit(f"refused: {reply}")


def run(broker: WaitingBroker, total: int, kill_at: int | None) -> dict[str, Any]:
    """One run: `total` submissions from all clients together; the broker is killed once `kill_at` were acknowledged."""
    context = multiprocessing.get_context("fork")
    out: Queue[Any] = context.Queue()
    gate, acked = context.Barrier(CLIENTS + 1), context.Value("i", 0)  # all begin when each has made its data
    share = total // CLIENTS
    clients = [
        context.Process(target=submit_all, args=(broker.contact, i, share, gate, acked, out)) for i in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    gate.wait(timeout=60)
    began_mono_s = time.monotonic()
    back_s = None
    if kill_at is not None:
        while acked.value < kill_at:
            time.sleep(0.002)
        broker.kill()
        back_s = broker.start()
    answers = [out.get(timeout=300) for _ in clients]
    took_s = time.monotonic() - began_mono_s
    for client in clients:
        client.join()
    ids = [i for found, _ in answers for i in found]
    latencies_s = sorted(s for _, found in answers for s in found)
    return {"ids": ids, "latencies_s": latencies_s, "took_s": took_s, "back_s": back_s}


def missing(broker: WaitingBroker, ids: list[int]) -> int:
    """How many acknowledged requests the broker does not know, counting an id given twice as one lost."""
    with BrokerClient(broker.contact) as client:
        reply = client.call(Accounting(), timeout_s=60)
    assert isinstance(reply, Requests)
    return len(ids) - len(set(ids) & {row.id for row in reply.rows})


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--total", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    rates, p50s, p99s, worst = [], [], [], 0.0
    for _ in range(given.runs):
        with waiting_broker() as broker:
            result = run(broker, given.total, None)
            lost_plain = missing(broker, result["ids"])
        latencies_s = result["latencies_s"]
        rates.append(len(latencies_s) / result["took_s"])
        p50s.append(1000 * latencies_s[len(latencies_s) // 2])
        p99s.append(1000 * latencies_s[int(0.99 * len(latencies_s))])
        worst = max(worst, 1000 * latencies_s[-1])
    with waiting_broker() as broker:
        killed = run(broker, given.total, given.total // 2)
        lost = missing(broker, killed["ids"]) + lost_plain
    figures = {
        "acked_per_s": statistics.median(rates),
        "p50_ms": statistics.median(p50s),
        "p99_ms": statistics.median(p99s),
        "max_ms": worst,
        "lost": lost,
        "acked": len(killed["ids"]),
        "restart_s": killed["back_s"],
        "total": given.total,
        "clients": CLIENTS,
        "rows_each": ROWS,
        "auth": "owner",
    }
    emit("submit", figures, given.runs, given.json)


if __name__ == "__main__":
    main()

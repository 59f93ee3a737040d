"""A whole broker in a thread, with a provider of allocations that a test plays, and workers that a test plays too."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import zmq

from broker.allocations import Account, AllocationOrder, JobReport, JobState
from broker.daemon import loop
from broker.daemon.allocator import Allocator
from broker.daemon.clients import About, Clients
from broker.daemon.loop import Daemon, Wiring
from broker.daemon.spool import Spool, load_secret
from broker.daemon.workers import Workers
from broker.net.client import BrokerClient, Contact, check_listening
from broker.net.doors import ClientDoor, WorkerDoor
from broker.protocol.config import SiteConfig, WorkerConfig
from broker.protocol.errors import BrokerUnreachable, Transient
from broker.protocol.messages import (
    Assign,
    Ended,
    HeartbeatAck,
    Message,
    Profile,
    Ready,
    Register,
    Registered,
    Running,
    Submit,
    Submitted,
    pack,
    to_worker_decoder,
    unpack,
)
from broker.protocol.spec import Identity, RequestSpec
from broker.protocol.states import RequestState
from broker.store.journal import Journal
from tests.unit.broker.worlds import ALICE, pool, site, spec

LIMIT_S = 20.0
ROWS = b'{"input":"a","target":"b"}\n'
M = TypeVar("M", bound=Message)


def until(condition: Callable[[], Any]) -> Any:
    """Waits for something true, with a limit."""
    end = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return found


def listening(address: str) -> bool:
    try:
        check_listening(address)
    except BrokerUnreachable:
        return False
    return True


class FakeProvider:
    """Remembers what it is asked for; jobs run until they are cancelled or ended. Faults are raised when set."""

    name = "fake"

    def __init__(self) -> None:
        self.orders: list[AllocationOrder] = []
        self.jobs: dict[str, JobReport] = {}
        self.cancelled: list[str] = []
        self.polls = 0
        self.submit_fault: Exception | None = None
        self.poll_fault: Exception | None = None
        self.accounts_fault: Exception | None = None
        self._lock = threading.Lock()

    def submit(self, order: AllocationOrder) -> str:
        if self.submit_fault is not None:
            raise self.submit_fault
        with self._lock:
            if order.name not in self.jobs:
                self.orders.append(order)
                job_id = f"j{len(self.orders)}"
                self.jobs[order.name] = JobReport(name=order.name, job_id=job_id, state=JobState.RUNNING)
            return self.jobs[order.name].job_id

    def cancel(self, job_ids: Sequence[str]) -> None:
        with self._lock:
            self.cancelled += job_ids
            self.jobs = {name: job for name, job in self.jobs.items() if job.job_id not in job_ids}

    def poll(self) -> list[JobReport]:
        self.polls += 1
        if self.poll_fault is not None:
            raise self.poll_fault
        with self._lock:
            return list(self.jobs.values())

    def accounts(self) -> dict[str, Account] | None:
        if self.accounts_fault is not None:
            raise self.accounts_fault
        return None

    def end(self, name: str) -> None:
        """The job goes away, as when its node fails."""
        with self._lock:
            del self.jobs[name]


class Worker:
    """A worker's side of the wire, word by word."""

    def __init__(self, order: AllocationOrder, incarnation: str = "one") -> None:
        self.config = msgspec.json.decode(order.worker_file.read_bytes(), type=WorkerConfig)
        self.incarnation = incarnation
        self.epoch = 0
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.connect(self.config.broker)

    def close(self) -> None:
        self._socket.close()

    def say(self, message: Message) -> None:
        self._socket.send_multipart(pack(message))

    def hear(self, kind: type[M]) -> M:
        """The next message, which is of this kind; acknowledged heartbeats are passed over."""
        end = time.monotonic() + LIMIT_S
        while True:
            assert self._socket.poll(max(0, int((end - time.monotonic()) * 1000))), f"no {kind.__name__} came"
            message = unpack(self._socket.recv_multipart(), to_worker_decoder)
            if isinstance(message, HeartbeatAck) and kind is not HeartbeatAck:
                continue
            assert isinstance(message, kind), message
            return message

    def registration(self, running: Sequence[tuple[int, int]] = (), **fields: Any) -> Register:
        words: dict[str, Any] = {
            "allocation": self.config.allocation,
            "key": self.config.key,
            "incarnation": self.incarnation,
            "job_id": "",
            "restart_count": 0,
            "host": "node1",
            "gpus": "0",
            "pid": 1,
            "end_unix_s": 0.0,
            "running": [Running(request_id=i, attempt=a) for i, a in running],
            "ready": False,
        }
        return Register(**(words | fields))

    def register(self, running: Sequence[tuple[int, int]] = ()) -> Registered:
        self.say(self.registration(running))
        registered = self.hear(Registered)
        self.epoch = registered.epoch
        return registered

    def ready(self) -> None:
        self.say(Ready(epoch=self.epoch, phases_s={"imports": 1.0}, profile=Profile(base_s=0.01, per_request_s=0.0)))

    def end(self, assign: Assign, **fields: Any) -> Ended:
        """Says that the attempt has ended, well unless told otherwise."""
        words: dict[str, Any] = {
            "epoch": self.epoch,
            "request_id": assign.request_id,
            "attempt": assign.attempt,
            "state": RequestState.COMPLETED,
            "step": 250,
            "loss": 0.1,
            "files": {"prompttuner.json": b"{}"},
        }
        message = Ended(**(words | fields))
        self.say(message)
        return message


class Caller:
    """Says that everything is from whoever the test wants."""

    def __init__(self) -> None:
        self.identity = ALICE

    def identify(self, body: bytes, credential: bytes) -> Identity:
        return self.identity


class Broker:
    """One broker at a time over one state folder; `kill` leaves everything as it stands, as SIGKILL does."""

    def __init__(self, folder: Path, config: SiteConfig) -> None:
        self.folder, self.site = folder, config
        self.provider, self.caller = FakeProvider(), Caller()
        self.address = f"ipc://{folder}/client"
        self.workers: list[Worker] = []
        self._thread: threading.Thread | None = None
        self._kill = threading.Event()
        self.failure: BaseException | None = None
        self.tag = ""
        self._client: BrokerClient | None = None

    @property
    def client(self) -> BrokerClient:
        if self._client is None:
            self._client = BrokerClient(Contact(address=self.address))
        return self._client

    def start(self, accounts: bool = True) -> None:
        """Comes up; unless told otherwise, waits until requests are taken."""
        self._kill.clear()
        up = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=[up])
        self._thread.start()
        up.wait(LIMIT_S)
        if accounts and self.failure is None:
            until(self._takes_requests)

    def _takes_requests(self) -> bool:
        try:
            self.submit(test_only=True)
        except Transient:
            return False
        return True

    def _serve(self, up: threading.Event) -> None:
        try:
            self._serve_until_killed(up)
        except BaseException as error:
            self.failure = error
        finally:
            up.set()

    def _serve_until_killed(self, up: threading.Event) -> None:
        journal = Journal(self.folder / "journal.sqlite")
        spool = Spool(self.site, self.folder / "spool", self.folder / "bank", load_secret(self.folder / "secret"))
        client_door = ClientDoor(self.address, None, 1 << 24, self.caller)
        worker_door = WorkerDoor(f"ipc://{self.folder}/worker", None, 1 << 24)
        allocator = Allocator(self.provider)
        self.tag = journal.tag
        try:
            daemon = Daemon(
                Wiring(
                    site=self.site,
                    journal=journal,
                    spool=spool,
                    allocator=allocator,
                    client_door=client_door,
                    worker_door=worker_door,
                    clients=Clients(client_door, journal, About(version="0", pid=os.getpid(), up_since_unix_s=1.0)),
                    workers=Workers(worker_door, journal, spool),
                    worker_address=worker_door.address,
                    server_public_key=None,
                )
            )
            up.set()
            while not self._kill.is_set() and not daemon._stopping:
                daemon.turn(min(0.02, daemon._timeout_s()))
        finally:
            allocator.close()
            client_door.close()
            worker_door.close()
            journal.close()

    @property
    def serving(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def kill(self) -> None:
        self._kill.set()
        if self._thread:
            self._thread.join(LIMIT_S)
            for address in (self.address, f"ipc://{self.folder}/worker"):
                until(lambda address=address: not listening(address))  # a socket closes a little later
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def submit(self, key: str = "", data: bytes = ROWS, test_only: bool = False, **fields: Any) -> int:
        digest = hashlib.sha256(data).hexdigest()
        message = Submit(
            spec=spec(**({"train": digest} | fields)),
            submit_key=key or os.urandom(16).hex(),
            blobs={digest: data},
            test_only=test_only,
        )
        reply = self.client.call(message, LIMIT_S)
        assert isinstance(reply, Submitted)
        return reply.id

    def worker(self, number: int = 0, incarnation: str = "one") -> Worker:
        """The worker of the provider's n-th order, not yet registered."""
        until(lambda: len(self.provider.orders) > number)
        worker = Worker(self.provider.orders[number], incarnation)
        self.workers.append(worker)
        return worker

    def warm_worker(self, number: int = 0, incarnation: str = "one") -> Worker:
        worker = self.worker(number, incarnation)
        worker.register()
        worker.ready()
        return worker

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        if self._client:
            self._client.close()
        self.kill()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Polls and repetitions come soon, so that tests do not wait for them."""
    monkeypatch.setattr(loop, "UNSETTLED_POLL_S", 0.05)
    monkeypatch.setattr(loop, "RESUBMIT_S", 0.05)


@pytest.fixture
def make_broker(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Iterator[Callable[..., Broker]]:
    made: list[Broker] = []

    def make(**fields: Any) -> Broker:
        broker = Broker(tmp_path_factory.mktemp("b"), site(a=pool(**fields)))
        made.append(broker)
        return broker

    yield make
    for broker in made:
        broker.close()


@pytest.fixture
def broker(make_broker: Callable[..., Broker]) -> Broker:
    """A broker that serves."""
    made = make_broker()
    made.start()
    return made


@pytest.fixture
def plain_spec() -> RequestSpec:
    return spec(train=hashlib.sha256(ROWS).hexdigest())

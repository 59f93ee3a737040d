"""A thread that talks to the allocation provider, so that a slow Slurm never holds up the broker's loop."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable

from msgspec import Struct

from broker.allocations import Account, AllocationOrder, AllocationProvider, JobReport
from broker.protocol.errors import PromptTunerError, SlurmRejected

log = logging.getLogger(__name__)


class SubmittedJob(Struct, frozen=True):
    allocation_id: int
    job_id: str


class SubmitFailed(Struct, frozen=True):
    allocation_id: int
    error: str
    permanent: bool


class Polled(Struct, frozen=True):
    reports: list[JobReport]


class AccountsLearned(Struct, frozen=True):
    accounts: dict[str, Account] | None


class CallFailed(Struct, frozen=True):
    what: str
    error: str


Outcome = SubmittedJob | SubmitFailed | Polled | AccountsLearned | CallFailed


class Allocator:
    """Runs provider calls one after the other; outcomes are collected with `drain`, announced on the file `wake_fd`."""

    def __init__(self, provider: AllocationProvider) -> None:
        self._provider = provider
        self._calls: queue.Queue[Callable[[], Outcome | None] | None] = queue.Queue()
        self._outcomes: queue.Queue[Outcome] = queue.Queue()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="allocator", daemon=True)
        self._thread.start()

    def submit(self, allocation_id: int, order: AllocationOrder) -> None:
        def call() -> Outcome:
            try:
                return SubmittedJob(allocation_id, self._provider.submit(order))
            except SlurmRejected as error:
                return SubmitFailed(allocation_id, error.message, True)
            except Exception as error:
                return SubmitFailed(allocation_id, _told(error), False)

        self._calls.put(call)

    def cancel(self, job_ids: list[str]) -> None:
        def call() -> None:
            self._provider.cancel(job_ids)

        self._calls.put(lambda: self._guarded("cancel", call))

    def poll(self) -> None:
        self._calls.put(lambda: self._guarded("poll", lambda: Polled(self._provider.poll())))

    def learn_accounts(self) -> None:
        self._calls.put(lambda: self._guarded("accounts", lambda: AccountsLearned(self._provider.accounts())))

    def drain(self) -> list[Outcome]:
        """What has come back since the last call."""
        try:
            os.eventfd_read(self.wake_fd)
        except BlockingIOError:
            return []
        outcomes: list[Outcome] = []
        while True:
            try:
                outcomes.append(self._outcomes.get_nowait())
            except queue.Empty:
                return outcomes

    def close(self) -> None:
        """Lets the calls under way end, for a few seconds."""
        self._calls.put(None)
        self._thread.join(timeout=5)

    def _guarded(self, what: str, call: Callable[[], Outcome | None]) -> Outcome | None:
        try:
            return call()
        except Exception as error:
            return CallFailed(what, _told(error))

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            outcome = call()
            if outcome is not None:
                self._outcomes.put(outcome)
                os.eventfd_write(self.wake_fd, 1)


def _told(error: Exception) -> str:
    """What to say of it. A bug in a provider must neither end the thread nor leave a call without its outcome."""
    if isinstance(error, PromptTunerError):
        return error.message
    log.error("the allocation provider failed", exc_info=error)
    return repr(error)

"""The broker's loop: gather what happened, step the core, commit, answer, act; look at the whole state now and then."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import zmq
from msgspec import Struct

from broker.core import commands
from broker.core.schedule import decide, observe, recover
from broker.daemon.allocator import (
    AccountsLearned,
    Allocator,
    CallFailed,
    Outcome,
    Polled,
    SubmitFailed,
    SubmittedJob,
)
from broker.daemon.clients import Clients
from broker.daemon.spool import Spool
from broker.daemon.turn import Turn
from broker.daemon.workers import Workers
from broker.net.doors import ClientDoor, WorkerDoor
from broker.protocol.config import SiteConfig
from broker.protocol.errors import ConfigError, Transient
from broker.protocol.states import AllocationState
from broker.state.events import AllocationDrained, AllocationRefused, AllocationSubmitted, Now
from broker.state.model import Allocation, State
from broker.store.journal import Journal

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at the whole state when nothing happens
LOOK_SHARE = 10  # a look may take a tenth of the loop's time
UNSETTLED_POLL_S = 1.0  # while allocations come or go, or a worker is silent
SETTLE_S = 90.0
RESUBMIT_S = 5.0
ACCOUNTS_S = 300.0
PRUNE_S = 3600.0


class Wiring(Struct, frozen=True, kw_only=True):
    """What a daemon is made of."""

    site: SiteConfig
    journal: Journal
    spool: Spool
    allocator: Allocator
    client_door: ClientDoor
    worker_door: WorkerDoor
    clients: Clients
    workers: Workers
    worker_address: str  # what workers dial
    server_public_key: str | None
    clock: Callable[[], Now] = lambda: Now(time.time(), time.monotonic())


class Daemon:
    """Owns the state; `run` turns until `stop`."""

    def __init__(self, wiring: Wiring) -> None:
        self._w = wiring
        self._stopping = False
        self._accounts_known = False
        self._dirty = True
        self._look_at_mono_s = 0.0
        self._looked_mono_s = 0.0
        self._polled_mono_s = -math.inf  # when the last poll came back; infinite while one is under way
        self._accounts_due_mono_s = self._prune_due_mono_s = 0.0
        self._in_flight: set[int] = set()
        self._resubmit_mono_s: dict[int, float] = {}
        self._poller = zmq.Poller()
        for source in (wiring.client_door.socket, wiring.worker_door.socket, wiring.allocator.wake_fd):
            self._poller.register(source, zmq.POLLIN)
        self.state = self._restore()

    def stop(self) -> None:
        self._stopping = True

    def run(self) -> None:
        """Serves until `stop`. Workers go on without us and come back to the next broker."""
        while not self._stopping:
            self.turn(self._timeout_s())
        self._w.allocator.close()
        self._w.worker_door.close()
        self._w.journal.close()
        self._w.client_door.close()  # last: when nobody listens there, a new broker may start

    def turn(self, timeout_s: float) -> None:
        """Waits up to `timeout_s` for something to happen, then handles all that has."""
        self._poller.poll(max(0, int(timeout_s * 1000)))
        turn = Turn(self.state, self._w.clock())
        self._w.workers.take(turn)  # before the polls: a result that came before its job's end counts
        self._take_outcomes(turn)
        self._w.clients.take(turn, "" if self._accounts_known else "the broker has not learned the accounts yet")
        durable = self._finish(turn)
        if turn.stop and durable:
            self._end(turn.end_workers)
            return
        self._look()
        self._chores()

    def _end(self, end_workers: bool) -> None:
        self.stop()
        if end_workers:
            turn = Turn(self.state, self._w.clock())
            for allocation_id in list(self.state.allocations):
                turn.apply(AllocationDrained(allocation_id=allocation_id, reason="the broker was stopped"))
            self._finish(turn)
            self._w.allocator.cancel([a.job_id for a in self.state.allocations.values() if a.job_id])

    def _restore(self) -> State:
        state = State(site=self._w.site, tag=self._w.journal.tag)
        self._w.journal.fill(state)
        _check_pools(state)
        self._w.workers.forget_peers()
        for command in recover(state, self._w.clock()):
            self._carry_out(state, command)
        return state

    def _finish(self, turn: Turn) -> bool:
        """Commits, then answers and acts; whether the turn is on disk."""
        failure = None
        try:
            self._w.journal.commit(turn.batch, turn.state)
        except Transient as error:
            failure = error
            log.error("%s", error.message)
        self._w.clients.answer(turn, failure)
        if failure is not None:
            # Memory is ahead of the disk now: go back to what the disk says. Workers register again.
            accounts = self.state.accounts
            self.state = self._restore()
            self.state.accounts = accounts
            return False
        for command in turn.commands:
            self._carry_out(turn.state, command)
        self._w.clients.tell_watchers(turn)
        self._dirty = self._dirty or bool(turn.batch.events)
        return True

    def _look(self) -> None:
        """Asks the policy, if something changed or time passed; never more than a share of the loop's time."""
        started = self._w.clock()
        if started.mono_s < self._look_due_mono_s():
            return
        self._dirty, self._looked_mono_s = False, started.mono_s
        turn = Turn(self.state, started)
        for event in decide(self.state, started):
            turn.apply(event)
        self._finish(turn)
        took_s = self._w.clock().mono_s - started.mono_s
        self._look_at_mono_s = started.mono_s + took_s * LOOK_SHARE

    def _timeout_s(self) -> float:
        now = self._w.clock()
        due_mono_s = min(
            self._look_due_mono_s(),
            self._polled_mono_s + self._poll_s(now),
            self._accounts_due_mono_s,
            self._prune_due_mono_s,
            *self._resubmit_mono_s.values(),
        )
        return max(0.0, due_mono_s - now.mono_s)

    def _look_due_mono_s(self) -> float:
        return self._look_at_mono_s if self._dirty else max(self._look_at_mono_s, self._looked_mono_s + LOOK_S)

    def _take_outcomes(self, turn: Turn) -> None:
        for outcome in self._w.allocator.drain():
            self._take_outcome(turn, outcome)

    def _take_outcome(self, turn: Turn, outcome: Outcome) -> None:
        match outcome:
            case SubmittedJob():
                self._in_flight.discard(outcome.allocation_id)
                turn.apply(AllocationSubmitted(allocation_id=outcome.allocation_id, job_id=outcome.job_id))
            case SubmitFailed():
                self._in_flight.discard(outcome.allocation_id)
                log.warning("allocation %d: %s", outcome.allocation_id, outcome.error)
                if outcome.permanent:
                    turn.apply(AllocationRefused(allocation_id=outcome.allocation_id, error=outcome.error))
                else:
                    self._resubmit_mono_s[outcome.allocation_id] = turn.now.mono_s + RESUBMIT_S
            case Polled():
                self._polled_mono_s = turn.now.mono_s
                happened, strays = observe(turn.state, outcome.reports, self._in_flight)
                for event in happened:
                    turn.apply(event)
                turn.commands += strays
            case AccountsLearned():
                self._accounts_known, turn.state.accounts = True, outcome.accounts
            case CallFailed():
                log.warning("%s failed: %s", outcome.what, outcome.error)
                if outcome.what == "poll":
                    self._polled_mono_s = turn.now.mono_s
                elif outcome.what == "accounts" and not self._accounts_known:
                    self._accounts_due_mono_s = turn.now.mono_s + RESUBMIT_S

    def _carry_out(self, state: State, command: commands.AnyCommand) -> None:
        try:
            self._try_to_carry_out(state, command)
        except OSError as error:  # the shared filesystem is full or away: no reason to end
            log.warning("%s: %s", type(command).__name__, error)
            if isinstance(command, commands.SubmitAllocation):
                self._resubmit_mono_s[command.allocation_id] = self._w.clock().mono_s + RESUBMIT_S

    def _try_to_carry_out(self, state: State, command: commands.AnyCommand) -> None:
        if isinstance(command, commands.SubmitAllocation):
            allocation = state.allocations.get(command.allocation_id)
            if allocation is not None and allocation.state is AllocationState.ORDERED:
                order = self._w.spool.order(allocation, self._w.worker_address, self._w.server_public_key)
                self._in_flight.add(allocation.id)
                self._w.allocator.submit(allocation.id, order)
        elif isinstance(command, commands.CancelJob):
            self._w.allocator.cancel([command.job_id])
        elif isinstance(command, commands.ForgetCheckpoint):
            self._w.spool.forget_checkpoint(command.request_id)
        elif isinstance(command, commands.ForgetAllocation):
            self._w.spool.forget(command.name)
        else:
            self._w.workers.carry_out(state, command)

    def _chores(self) -> None:
        now = self._w.clock()
        for allocation_id in [i for i, due in self._resubmit_mono_s.items() if due <= now.mono_s]:
            del self._resubmit_mono_s[allocation_id]
            self._carry_out(self.state, commands.SubmitAllocation(allocation_id))
        if now.mono_s >= self._polled_mono_s + self._poll_s(now):
            self._polled_mono_s = math.inf
            self._w.allocator.poll()
        if now.mono_s >= self._accounts_due_mono_s:
            self._accounts_due_mono_s = now.mono_s + ACCOUNTS_S
            self._w.allocator.learn_accounts()
        if now.mono_s >= self._prune_due_mono_s:
            self._prune_due_mono_s = now.mono_s + PRUNE_S
            self._prune(now.unix_s - self._w.site.limits.retention)

    def _prune(self, before_unix_s: float) -> None:
        try:
            self._w.journal.prune(before_unix_s)
            self._w.spool.prune(before_unix_s)
        except (Transient, OSError) as error:
            log.warning("old results stay for now: %s", error)

    def _poll_s(self, now: Now) -> float:
        if self._w.site.backend == "local":
            return UNSETTLED_POLL_S
        unsettled = any(self._unsettled(a, now) for a in self.state.allocations.values())
        return UNSETTLED_POLL_S if unsettled else self._w.site.slurm.poll

    def _unsettled(self, allocation: Allocation, now: Now) -> bool:
        """Whether its job's state matters soon. A job that has waited for a while needs no eye on it: its worker will
        register."""
        if allocation.state in (AllocationState.ORDERED, AllocationState.PENDING):
            return now.unix_s - allocation.ordered_unix_s < SETTLE_S
        if allocation.state is AllocationState.DRAINING:
            return now.mono_s - allocation.draining_since_mono_s < SETTLE_S
        return now.mono_s - allocation.heard_mono_s > 3 * self._w.site.limits.heartbeat


def _check_pools(state: State) -> None:
    for kind, records in (("requests", state.requests), ("allocations", state.allocations)):
        gone = {r.pool for r in records.values()} - state.site.pools.keys()
        if gone:
            raise ConfigError(
                f"the journal has open {kind} of pools that the site file no longer has: {', '.join(sorted(gone))}",
                "keep such a pool in the file until nothing of it is left",
            )

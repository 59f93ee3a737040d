"""The broker's side of its workers: their messages become events, the core's commands become messages to them."""

from __future__ import annotations

import hashlib
import logging
import secrets

import msgspec

from broker.core import commands
from broker.core.admission import enlist
from broker.daemon.spool import Spool
from broker.daemon.turn import Turn
from broker.net.doors import WorkerDoor
from broker.protocol import messages
from broker.protocol.messages import FromWorker, Running, ToWorker
from broker.state import events
from broker.state.model import State
from broker.store.journal import Journal

log = logging.getLogger(__name__)


class Workers:
    """Knows which peer of the worker door holds which allocation."""

    def __init__(self, door: WorkerDoor, journal: Journal, spool: Spool) -> None:
        self._door, self._journal, self._spool = door, journal, spool
        self._peer_of: dict[int, bytes] = {}
        self._allocation_of: dict[bytes, int] = {}

    def forget_peers(self) -> None:
        """Makes every worker register again."""
        self._peer_of.clear()
        self._allocation_of.clear()

    def take(self, turn: Turn) -> None:
        """Turns what has arrived into events. An unknown peer is asked to register; it is never an error."""
        for peer, message in self._door.receive(1000):
            if isinstance(message, messages.Register):
                self._register(turn, peer, message)
                continue
            allocation = turn.state.allocations.get(self._allocation_of.get(peer, 0))
            if allocation is None or allocation.epoch != message.epoch:
                self._door.send(peer, messages.Reregister(reason="the broker does not know this worker"))
                continue
            if isinstance(message, messages.Heartbeat):
                self._door.send(peer, messages.HeartbeatAck(epoch=message.epoch))
            for event in self._events(turn, allocation.id, message):
                turn.apply(event)

    def _register(self, turn: Turn, peer: bytes, message: messages.Register) -> None:
        known = turn.state.by_name(message.allocation)
        key = self._spool.key_of(message.allocation) if known else None
        answer = enlist(turn.state, message, key, secrets.randbits(32))
        if isinstance(answer, messages.Goodbye):
            log.warning("turned away a worker of %s on %s: %s", message.allocation, message.host, answer.reason)
            self._door.send(peer, answer)
            return
        former = self._peer_of.get(answer.allocation_id)
        if former is not None and former != peer:
            self._allocation_of.pop(former, None)
        self._peer_of[answer.allocation_id] = peer
        self._allocation_of[peer] = answer.allocation_id
        turn.apply(answer)

    def _events(self, turn: Turn, allocation_id: int, message: FromWorker) -> list[events.AnyEvent]:
        heard: events.AnyEvent = events.WorkerHeard(allocation_id=allocation_id, rss_mb=getattr(message, "rss_mb", 0.0))
        match message:
            case messages.Ready():
                ready = events.WorkerReady(
                    allocation_id=allocation_id,
                    epoch=message.epoch,
                    phases_s=message.phases_s,
                    profile=message.profile,
                )
                return [heard, ready]
            case messages.Progress():
                return [heard, _progress(turn.state, allocation_id, message)]
            case messages.Ended():
                return [heard, self._ended(turn, allocation_id, message)]
            case messages.Leaving():
                leaving = events.WorkerLeaving(
                    allocation_id=allocation_id,
                    epoch=message.epoch,
                    reason=message.reason,
                    given_back=message.given_back,
                    final=message.final,
                    restarting=message.restarting,
                )
                return [heard, leaving]
        return [heard]

    def _ended(self, turn: Turn, allocation_id: int, message: messages.Ended) -> events.RequestEnded:
        result = None
        if message.files:
            data = msgspec.msgpack.encode(message.files)
            result = hashlib.sha256(data).hexdigest()
            turn.batch.blobs[result] = data
        return events.RequestEnded(
            allocation_id=allocation_id,
            epoch=message.epoch,
            request_id=message.request_id,
            attempt=message.attempt,
            state=message.state,
            step=message.step,
            loss=message.loss,
            score=message.score,
            error=message.error,
            result=result,
        )

    def carry_out(self, state: State, command: commands.ToWorkerCommand) -> None:
        """Sends one command's message. A worker that is not connected gets it when it registers again."""
        allocation_id = command.allocation_id
        peer = self._peer_of.get(allocation_id)
        message = self._message(state, command)
        if peer is not None and message is not None and not self._door.send(peer, message):
            self._allocation_of.pop(peer, None)
            self._peer_of.pop(allocation_id, None)
            if allocation_id in state.allocations:
                state.allocations[allocation_id].connected = False

    def _message(self, state: State, command: commands.ToWorkerCommand) -> ToWorker | None:
        match command:
            case commands.Greet():
                drop = [Running(request_id=i, attempt=a) for i, a in command.drop]
                return messages.Registered(epoch=state.allocations[command.allocation_id].epoch, drop=drop)
            case commands.SendAssign():
                return self._assign(state, command)
            case commands.SendStop():
                return messages.Stop(request_id=command.request_id, attempt=command.attempt, reason=command.reason)
            case commands.SendEndedAck():
                return messages.EndedAck(request_id=command.request_id, attempt=command.attempt)
            case commands.SendDrain():
                return messages.Drain(reason=command.reason)
        return None

    def _assign(self, state: State, command: commands.SendAssign) -> messages.Assign | None:
        request = state.requests.get(command.request_id)
        if request is None or request.attempt != command.attempt:
            return None
        spec = request.spec
        train = self._journal.blob(spec.train)
        if train is None:
            log.error("the data of request %d is not in the journal", request.id)
            return None
        return messages.Assign(
            request_id=request.id,
            attempt=command.attempt,
            user=request.user,
            uid=request.uid,
            account=request.account,
            spec=spec,
            train=train,
            eval=self._journal.blob(spec.eval) if spec.eval else None,
        )


def _progress(state: State, allocation_id: int, message: messages.Progress) -> events.AnyEvent:
    request = state.requests.get(message.request_id)
    new_for_the_record = request is not None and (
        (message.first_step_unix_s and not request.first_step_unix_s)
        or (message.step_id and message.step_id != request.step_id)
    )
    kind = events.RequestStarted if new_for_the_record else events.RequestProgressed
    return kind(
        allocation_id=allocation_id,
        request_id=message.request_id,
        attempt=message.attempt,
        step=message.step,
        loss=message.loss,
        score=message.score,
        remaining_s=message.remaining_s,
        start=message.start,
        lookup_s=message.lookup_s,
        first_step_unix_s=message.first_step_unix_s,
        step_id=message.step_id,
    )

"""The broker's side of login nodes: each message is answered, changes only after they are on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable

import msgspec
from msgspec import Struct

from broker.core.admission import admit, cancellations, check_promise, predict, visible
from broker.daemon.turn import Turn
from broker.net.doors import ClientDoor
from broker.protocol import messages
from broker.protocol.errors import NotFound, PromptTunerError, Refused, Transient, UsageError
from broker.protocol.messages import ErrorReply, Message
from broker.protocol.rows import AllocationRow, PoolRow, RequestRow
from broker.protocol.spec import Identity
from broker.protocol.states import AllocationState, RequestState
from broker.state.events import Now
from broker.state.model import Allocation, Request, State
from broker.store.journal import Journal

WATCH_TTL_S = 15.0
MAX_WATCHED = 1000


class About(Struct, frozen=True, kw_only=True):
    """What `ptinfo` says of the broker itself."""

    version: str
    pid: int
    up_since_unix_s: float


class Clients:
    """Answers login nodes, and keeps those up to date who watch a request."""

    def __init__(self, door: ClientDoor, journal: Journal, about: About) -> None:
        self._door, self._journal, self._about = door, journal, about
        self._watchers: dict[int, dict[bytes, float]] = {}  # request -> peer -> until (monotonic)

    def take(self, turn: Turn, submissions_refused: str) -> None:
        """Handles what has arrived. `submissions_refused` says why nothing new is taken now, if so."""
        for peer, caller, message in self._door.receive(500):
            try:
                self._handle(turn, peer, caller, message, submissions_refused)
            except PromptTunerError as error:
                turn.reply(peer, ErrorReply(code=error.code, message=error.message, hint=error.hint))

    def _handle(self, turn: Turn, peer: bytes, caller: Identity, message: messages.ClientRequest, refused: str) -> None:
        match message:
            case messages.Submit():
                if refused:
                    raise Transient(refused, "try again in a moment")
                self._submit(turn, peer, caller, message)
            case messages.Cancel():
                self._cancel(turn, peer, caller, message)
            case messages.Queue():
                turn.replies.append((peer, self._queue(turn.state, caller, message, turn.now)))
            case messages.Accounting():
                turn.replies.append((peer, self._accounting(turn.state, caller, message)))
            case messages.Info():
                turn.replies.append((peer, lambda: info(turn.state, self._about)))
            case messages.Fetch():
                turn.reply(peer, self._fetch(turn.state, caller, message.id))
            case messages.Watch():
                self._watch(turn, peer, caller, message.ids)
            case messages.Shutdown():
                if not caller.admin:
                    raise Refused("only an admin of the broker may stop it", "ask the site's admin")
                turn.stop, turn.end_workers = True, message.end_workers
                turn.reply(peer, messages.ShuttingDown(workers=len(turn.state.allocations)))

    def _submit(self, turn: Turn, peer: bytes, caller: Identity, message: messages.Submit) -> None:
        state, spec = turn.state, message.spec
        known = state.by_key.get(message.submit_key) or self._journal.id_of_key(message.submit_key)
        if known is not None:  # sent again after a lost answer: the same request, the same answer
            earlier = self._find(state, caller, known)
            turn.reply(peer, _acknowledge(state, earlier, earlier.predicted_finish_unix_s, ""))
            return
        event = admit(state, message, caller, turn.now)
        self._check_blobs(message)
        probe = Request(
            id=event.request_id,
            spec=spec,
            uid=caller.uid,
            user=caller.user,
            account=event.account,
            pool=event.pool,
            submit_key=message.submit_key,
            submit_unix_s=turn.now.unix_s,
        )
        predicted_unix_s = predict(state, probe, turn.now)
        note = check_promise(probe, predicted_unix_s)
        if message.test_only:
            probe.id = 0
            turn.reply(peer, _acknowledge(state, probe, predicted_unix_s, note))
            return
        turn.batch.blobs.update(message.blobs)
        turn.apply(event)
        state.requests[event.request_id].predicted_finish_unix_s = predicted_unix_s
        turn.reply(peer, _acknowledge(state, state.requests[event.request_id], predicted_unix_s, note))

    def _check_blobs(self, message: messages.Submit) -> None:
        wanted = {d for d in (message.spec.train, message.spec.eval) if d}
        if set(message.blobs) - wanted:
            raise UsageError("the message carries data that its request does not name")
        for digest, data in message.blobs.items():
            if hashlib.sha256(data).hexdigest() != digest:
                raise UsageError("the data does not have the digest that its request names")
        if wanted - set(message.blobs):
            raise UsageError("the message lacks data that its request names")

    def _cancel(self, turn: Turn, peer: bytes, caller: Identity, message: messages.Cancel) -> None:
        ending, rest = cancellations(turn.state, message, caller)
        for request_id in rest:
            visible(self._journal.request(request_id), caller, request_id)
        for event in ending:
            turn.apply(event)
        turn.reply(peer, messages.Cancelled(ids=[e.request_id for e in ending], already_ended=rest))

    def _queue(self, state: State, caller: Identity, message: messages.Queue, now: Now) -> Callable[[], Message]:
        def answer() -> Message:
            if message.ids:
                found = [self._find(state, caller, i) for i in message.ids]
            else:
                found = [r for r in state.requests.values() if caller.admin or r.uid == caller.uid]
                if message.ended_within_s:
                    since, uid = now.unix_s - message.ended_within_s, None if caller.admin else caller.uid
                    found = self._journal.ended(since, now.unix_s, uid) + found
            return messages.Requests(rows=rows(state, found), cluster=state.site.cluster)

        return answer

    def _accounting(self, state: State, caller: Identity, message: messages.Accounting) -> Callable[[], Message]:
        def answer() -> Message:
            if message.ids:
                found = [self._find(state, caller, i) for i in message.ids]
            else:
                end_unix_s = message.end_unix_s or float("inf")
                ended = self._journal.ended(message.start_unix_s, end_unix_s, None if caller.admin else caller.uid)
                open_ = (r for r in state.requests.values() if caller.admin or r.uid == caller.uid)
                found = ended + [r for r in open_ if r.submit_unix_s <= end_unix_s]
            return messages.Requests(rows=rows(state, found), cluster=state.site.cluster)

        return answer

    def _find(self, state: State, caller: Identity, request_id: int) -> Request:
        return visible(state.requests.get(request_id) or self._journal.request(request_id), caller, request_id)

    def _fetch(self, state: State, caller: Identity, request_id: int) -> Message:
        request = self._find(state, caller, request_id)
        if not request.state.final:
            raise Refused(f"request {request_id} is {request.state.value}", f"wait for it: ptfetch --wait {request_id}")
        if request.state is not RequestState.COMPLETED or not request.result:
            why = f": {request.error}" if request.error else ""
            raise NotFound(f"request {request_id} ended {request.state.value} and has no result{why}")
        data = self._journal.blob(request.result)
        if data is None:
            kept_days = state.site.limits.retention / 86400
            raise NotFound(f"the result of request {request_id} is gone", f"results are kept for {kept_days:g} days")
        files = msgspec.msgpack.decode(data, type=dict[str, bytes])
        return messages.FetchReply(id=request_id, files=files)

    def _watch(self, turn: Turn, peer: bytes, caller: Identity, ids: list[int]) -> None:
        if len(ids) > MAX_WATCHED:
            raise UsageError(f"{len(ids)} requests watched at once, {MAX_WATCHED} are allowed")
        for request_id in ids:
            request = self._find(turn.state, caller, request_id)
            if not request.state.final:
                self._watchers.setdefault(request_id, {})[peer] = turn.now.mono_s + WATCH_TTL_S
            turn.replies.append((peer, _updater(turn.state, request)))

    def answer(self, turn: Turn, failure: Transient | None) -> None:
        """Sends the turn's replies; with `failure` set, that instead, for nothing of the turn is durable."""
        for peer, reply in turn.replies:
            try:
                if failure is not None:
                    raise failure
                message = reply()
            except PromptTunerError as error:
                message = ErrorReply(code=error.code, message=error.message, hint=error.hint)
            self._door.send(peer, message)

    def tell_watchers(self, turn: Turn) -> None:
        """Tells who watches a request that moved in this turn, and forgets watches that ended or were not renewed."""
        for request_id in turn.moved & self._watchers.keys():
            request = turn.state.requests.get(request_id) or self._journal.request(request_id)
            if request is None:
                continue
            peers = self._watchers[request_id]
            update = messages.Update(row=rows(turn.state, [request])[0])
            for peer, until_mono_s in list(peers.items()):
                if until_mono_s < turn.now.mono_s or not self._door.send(peer, update):
                    del peers[peer]
            if request.state.final or not peers:
                del self._watchers[request_id]


def _updater(state: State, request: Request) -> Callable[[], Message]:
    return lambda: messages.Update(row=rows(state, [request])[0])


def _acknowledge(state: State, request: Request, predicted_unix_s: float, note: str) -> messages.Submitted:
    return messages.Submitted(
        id=request.id,
        predicted_finish_unix_s=predicted_unix_s or None,
        deadline_unix_s=request.spec.deadline_unix_s,
        cluster=state.site.cluster,
        note=note,
    )


def rows(state: State, requests: Iterable[Request]) -> list[RequestRow]:
    """The requests as listings see them."""
    partitions = {name: pool.partition for name, pool in state.site.pools.items()}
    return [r.row(partitions.get(r.pool, "")) for r in requests]


def info(state: State, about: About) -> messages.InfoReply:
    """Pools, their allocations, and the broker itself."""
    waiting: dict[str, int] = {}
    for request in state.requests.values():
        if request.state is RequestState.PENDING:
            waiting[request.pool] = waiting.get(request.pool, 0) + 1
    pools = []
    for name, pool in state.site.pools.items():
        health = state.health.get(name)
        pools.append(
            PoolRow(
                name=name,
                model=pool.model,
                partition=pool.partition,
                min_workers=pool.min_workers,
                max_workers=pool.max_workers,
                idle_window_s=float(pool.idle_window),
                slots=pool.slots,
                gpus_per_worker=pool.gpus_per_worker,
                pending_requests=waiting.get(name, 0),
                available=health is None,
                reason=health.reason if health else "",
                allocations=[_allocation_row(a, pool.slots) for a in state.allocations_of(name)],
            )
        )
    return messages.InfoReply(
        cluster=state.site.cluster,
        version=about.version,
        backend=state.site.backend,
        mode=state.site.mode,
        pid=about.pid,
        up_since_unix_s=about.up_since_unix_s,
        active_requests=len(state.requests),
        rss_mb=resident_mb(),
        pools=pools,
    )


def _allocation_row(allocation: Allocation, slots: int) -> AllocationRow:
    idle = allocation.state is AllocationState.WARM and not allocation.running
    return AllocationRow(
        name=allocation.name,
        pool=allocation.pool,
        state=allocation.state,
        job_id=allocation.job_id,
        node=allocation.node,
        gpus=allocation.gpus,
        running=list(allocation.running),
        slots=slots,
        ordered_unix_s=allocation.ordered_unix_s,
        started_unix_s=allocation.started_unix_s,
        ready_unix_s=allocation.ready_unix_s,
        end_unix_s=allocation.end_unix_s,
        idle_since_unix_s=allocation.idle_since_unix_s if idle else 0.0,
        phases_s=allocation.phases_s,
        rss_mb=allocation.rss_mb,
        reason=allocation.reason,
    )


def resident_mb() -> float:
    """This process's resident memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

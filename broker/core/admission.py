"""Whether to take a request, a cancellation, a worker: pure checks that turn messages into events or refusals."""

from __future__ import annotations

import bisect
import difflib
import hmac
from collections.abc import Iterable

from broker.policy.estimate import remaining_s
from broker.policy.scaling import forecast
from broker.protocol.errors import NotFound, Refused, UsageError
from broker.protocol.messages import Cancel, Goodbye, Register, Submit
from broker.protocol.spec import Identity, RequestSpec
from broker.protocol.states import AllocationState, OnMiss, RequestState
from broker.state.events import Now, RequestCancelled, RequestSubmitted, WorkerRegistered
from broker.state.model import Request, State

MIB = 1 << 20


def admit(state: State, message: Submit, caller: Identity, now: Now) -> RequestSubmitted:
    """The event that takes the request in.

    Raises `Refused` or `UsageError` with what is wrong, the known names, and what to do.
    """
    spec = message.spec
    if spec.model not in state.site.models:
        raise Refused(f"unknown model: {spec.model}", _known("models", spec.model, state.site.models))
    account = _account(state, spec, caller)
    pool = _pool(state, spec)
    if spec.deadline_unix_s is not None and spec.deadline_unix_s <= now.unix_s:
        late_s = now.unix_s - spec.deadline_unix_s
        raise UsageError(f"the deadline is {late_s:.0f} s in the past", "give a later --deadline, or an --slo from now")
    limits = state.site.limits
    size = sum(len(blob) for blob in message.blobs.values())
    if size > limits.data_mb * MIB:
        raise Refused(f"the data is {size / MIB:.1f} MiB, the site's limit is {limits.data_mb} MiB", "send fewer rows")
    held = (
        sum(1 for r in state.requests.values() if r.uid == caller.uid)
        if len(state.requests) >= limits.pending_per_user
        else 0
    )
    if held >= limits.pending_per_user:
        raise Refused(
            f"{held} requests of yours are waiting, the site's limit is {limits.pending_per_user}",
            "wait for some to end",
        )
    return RequestSubmitted(
        request_id=state.counters.request_id + 1,
        spec=spec,
        uid=caller.uid,
        user=caller.user,
        account=account,
        pool=pool,
        submit_key=message.submit_key,
    )


def predict(state: State, request: Request, now: Now) -> float:
    """When a new request would finish: behind those that wait with earlier deadlines, as the last plan saw them."""
    learned = state.known(request.pool)
    own_s = remaining_s(request, learned, 1)
    waiting = state.outlook.get(request.pool, [])
    position = bisect.bisect_right(waiting, request.deadline_unix_s, key=lambda w: w[0])
    if position:
        return max(finish for _, finish in waiting[max(0, position - 8) : position]) + own_s
    slots = state.pool_of(request).slots
    if any(a.serving and len(a.running) < slots for a in state.allocations_of(request.pool)):
        return now.unix_s + own_s
    return forecast(state, request.pool, [request], [], now).finish_unix_s[request.id]


def check_promise(request: Request, predicted_unix_s: float) -> str:
    """A warning when the deadline will likely be missed. Raises `Refused` when its user wants it met or not at all."""
    late_s = predicted_unix_s - request.deadline_unix_s
    if late_s <= 0:
        return ""
    note = f"the predicted finish is {late_s:.0f} s after the deadline"
    if request.spec.on_miss is OnMiss.REJECT:
        raise Refused(note, "give it more time, or take --on-miss=continue")
    return note


def cancellations(state: State, message: Cancel, caller: Identity) -> tuple[list[RequestCancelled], list[int]]:
    """The requests to cancel, and the ids given that are not among the open ones (ended, or unknown to the caller)."""

    def matches(request: Request) -> bool:
        return (
            (caller.admin or request.uid == caller.uid)
            and (message.job_name is None or request.spec.job_name == message.job_name)
            and (message.account is None or request.account == message.account)
            and (message.partition is None or state.pool_of(request).partition == message.partition)
            and (message.state is None or request.state is message.state)
        )

    if not message.ids:
        if not message.mine:
            raise UsageError("nothing says which requests to cancel", "give ids, or --me with filters")
        chosen = [r for r in state.requests.values() if r.uid == caller.uid and matches(r)]
        return [RequestCancelled(request_id=r.id, by_uid=caller.uid) for r in chosen], []
    ids = dict.fromkeys(message.ids)  # each once
    open_ids = {i: None for i in ids if i in state.requests and matches(state.requests[i])}
    rest = [i for i in ids if i not in open_ids]
    return [RequestCancelled(request_id=i, by_uid=caller.uid) for i in open_ids], rest


def enlist(state: State, message: Register, key: str | None, draw: int) -> WorkerRegistered | Goodbye:
    """Whether a worker may hold its slot: it must know the allocation's `key` and not have been given up before.

    A new holder's epoch is higher than any before; its low 32 bits are `draw`, random ones, since later messages prove
    themselves by it."""
    allocation = state.by_name(message.allocation)
    if allocation is None or key is None or not hmac.compare_digest(message.key.encode(), key.encode()):
        return Goodbye(reason="no such allocation")
    if allocation.state is AllocationState.DRAINING and not allocation.epoch and allocation.incarnation:
        return Goodbye(reason="this worker was given up")
    same = allocation.incarnation == message.incarnation
    return WorkerRegistered(
        allocation_id=allocation.id,
        epoch=allocation.epoch if same else ((state.counters.epoch >> 32) + 1 << 32) | draw,
        incarnation=message.incarnation,
        job_id=message.job_id,
        restart_count=message.restart_count,
        host=message.host,
        gpus=message.gpus,
        end_unix_s=message.end_unix_s,
        running=message.running,
    )


def visible(request: Request | None, caller: Identity, request_id: int) -> Request:
    """The request, if the caller may see it. Raises `NotFound`, alike for what is not there and what is another's."""
    if request is None or not (caller.admin or request.uid == caller.uid):
        raise NotFound(f"no such request: {request_id}", "ptqueue lists yours, ptacct those that have ended")
    return request


def _account(state: State, spec: RequestSpec, caller: Identity) -> str:
    if state.accounts is None:
        allowed: Iterable[str] = state.site.accounts
        default = state.site.accounts[0] if state.site.accounts else "default"
    else:
        mine = state.accounts.get(caller.user)
        if mine is None:
            raise Refused(
                f"user {caller.user} has no account on this cluster", "ask the site's admin for one (sacctmgr)"
            )
        allowed, default = mine.allowed, mine.default
    account = spec.account or default
    if account not in allowed:
        raise Refused(f"account {account} is not one of yours", _known("your accounts", account, allowed))
    return account


def _pool(state: State, spec: RequestSpec) -> str:
    pools = {name: pool for name, pool in state.site.pools.items() if pool.model == spec.model}
    if not pools:
        raise Refused(f"no pool serves the model {spec.model}", "ask the site's admin to add one")
    if spec.partition:
        partitions = {pool.partition for pool in pools.values()}
        pools = {name: pool for name, pool in pools.items() if pool.partition == spec.partition}
        if not pools:
            hint = _known(f"partitions with {spec.model}", spec.partition, partitions)
            raise Refused(f"no pool of the model {spec.model} in partition {spec.partition}", hint)
    if spec.qos:
        named = {name: pool for name, pool in pools.items() if pool.qos == spec.qos}
        if not named:
            qos = {pool.qos for pool in pools.values() if pool.qos}
            raise Refused(f"no pool of the model {spec.model} has QOS {spec.qos}", _known("QOS", spec.qos, qos))
        pools = named
    waiting = dict.fromkeys(pools, 0)
    if len(pools) > 1:
        for request in state.requests.values():
            if request.state is RequestState.PENDING and request.pool in waiting:
                waiting[request.pool] += 1
    return min(pools, key=lambda name: waiting[name])


def _known(what: str, word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(word, names, 1)
    return f"{what}: {', '.join(names) or 'none'}" + (f"; did you mean {close[0]}?" if close else "")

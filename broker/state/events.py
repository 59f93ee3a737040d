"""Everything that can happen to the broker. An event is a fact with a wall-clock time; the journal is a list of them.

Evolution rule: append optional fields only, so that an old journal stays readable. Ephemeral events are not journalled:
they repeat by themselves.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import msgspec
from msgspec import Struct

from broker.allocations import JobState
from broker.protocol.messages import Profile, Running
from broker.protocol.spec import RequestSpec
from broker.protocol.states import RequestState


class Now(NamedTuple):
    """Wall time for deadlines and records, monotonic time for intervals: the wall clock may jump."""

    unix_s: float
    mono_s: float


class Event(Struct, frozen=True, kw_only=True, tag=True):
    ephemeral: ClassVar[bool] = False


# --- requests -------------------------------------------------------------------------------------------------------


class RequestSubmitted(Event, frozen=True):
    request_id: int
    spec: RequestSpec
    uid: int
    user: str
    account: str
    pool: str
    submit_key: str


class RequestPlaced(Event, frozen=True):
    """A decision: this attempt runs on this allocation."""

    request_id: int
    allocation_id: int
    attempt: int
    epoch: int


class RequestProgressed(Event, frozen=True):
    ephemeral: ClassVar[bool] = True
    allocation_id: int
    request_id: int
    attempt: int
    step: int
    loss: float | None = None
    score: float | None = None
    remaining_s: float | None = None
    start: str = ""
    lookup_s: float = 0.0
    first_step_unix_s: float = 0.0
    step_id: str = ""


class RequestStarted(RequestProgressed, frozen=True):
    """The progress that says something new for the record: a first step, a Slurm step."""

    ephemeral: ClassVar[bool] = False


class RequestEnded(Event, frozen=True):
    """A worker's word on the end of one attempt."""

    allocation_id: int
    epoch: int
    request_id: int
    attempt: int
    state: RequestState
    step: int
    loss: float | None = None
    score: float | None = None
    error: str = ""
    result: str | None = None  # digest of the stored result files


class RequestCancelled(Event, frozen=True):
    request_id: int
    by_uid: int


class RequestDropped(Event, frozen=True):
    """A decision: the deadline is missed, and its user wanted no more of it then (--on-miss=drop)."""

    request_id: int


# --- allocations ----------------------------------------------------------------------------------------------------


class AllocationOrdered(Event, frozen=True):
    """A decision, journalled before Slurm hears of it: the name is how the job is found again."""

    allocation_id: int
    name: str
    pool: str
    reason: str


class AllocationSubmitted(Event, frozen=True):
    allocation_id: int
    job_id: str


class AllocationRefused(Event, frozen=True):
    """Slurm said no for good: there is no such job."""

    allocation_id: int
    error: str


class AllocationObserved(Event, frozen=True):
    """One job as a poll saw it."""

    allocation_id: int
    job_id: str
    state: JobState
    reason: str = ""
    node: str = ""
    start_unix_s: float = 0.0
    end_unix_s: float = 0.0


class AllocationDrained(Event, frozen=True):
    """A decision: takes nothing new, ends when empty; a job that has not started is cancelled."""

    allocation_id: int
    reason: str


class WorkerRegistered(Event, frozen=True):
    allocation_id: int
    epoch: int
    incarnation: str
    job_id: str
    restart_count: int
    host: str
    gpus: str
    end_unix_s: float
    running: list[Running]


class WorkerReady(Event, frozen=True):
    allocation_id: int
    epoch: int
    phases_s: dict[str, float]
    profile: Profile


class WorkerLeaving(Event, frozen=True):
    allocation_id: int
    epoch: int
    reason: str
    given_back: list[Running]
    final: bool
    restarting: bool = False


class WorkerHeard(Event, frozen=True):
    ephemeral: ClassVar[bool] = True
    allocation_id: int
    rss_mb: float


class WorkerLost(Event, frozen=True):
    """Silent for longer than worker_timeout: its requests go elsewhere, its epoch is void, its job is cancelled."""

    allocation_id: int
    reason: str


AnyEvent = (
    RequestSubmitted
    | RequestPlaced
    | RequestProgressed
    | RequestStarted
    | RequestEnded
    | RequestCancelled
    | RequestDropped
    | AllocationOrdered
    | AllocationSubmitted
    | AllocationRefused
    | AllocationObserved
    | AllocationDrained
    | WorkerRegistered
    | WorkerReady
    | WorkerLeaving
    | WorkerHeard
    | WorkerLost
)

event_decoder: msgspec.msgpack.Decoder[AnyEvent] = msgspec.msgpack.Decoder(AnyEvent)

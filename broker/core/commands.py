"""What the core wants done. The shell carries commands out after the events that caused them are on disk."""

from __future__ import annotations

from msgspec import Struct


class Command(Struct, frozen=True):
    pass


class SubmitAllocation(Command, frozen=True):
    """Bring the ordered allocation up; safe to repeat, its name is unique."""

    allocation_id: int


class CancelJob(Command, frozen=True):
    job_id: str
    allocation_id: int


class Greet(Command, frozen=True):
    """Tell a worker its epoch, and which of its attempts are void."""

    allocation_id: int
    drop: tuple[tuple[int, int], ...]  # (request id, attempt)


class SendAssign(Command, frozen=True):
    allocation_id: int
    request_id: int
    attempt: int


class SendStop(Command, frozen=True):
    allocation_id: int
    request_id: int
    attempt: int
    reason: str


class SendEndedAck(Command, frozen=True):
    allocation_id: int
    request_id: int
    attempt: int


class SendDrain(Command, frozen=True):
    allocation_id: int
    reason: str


class ForgetCheckpoint(Command, frozen=True):
    """The request has ended: nobody will resume it."""

    request_id: int


class ForgetAllocation(Command, frozen=True):
    """The allocation has ended: its key is of no more use."""

    allocation_id: int
    name: str


AnyCommand = (
    SubmitAllocation
    | CancelJob
    | Greet
    | SendAssign
    | SendStop
    | SendEndedAck
    | SendDrain
    | ForgetCheckpoint
    | ForgetAllocation
)
ToWorkerCommand = Greet | SendAssign | SendStop | SendEndedAck | SendDrain

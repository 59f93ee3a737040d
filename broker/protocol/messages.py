"""The words on the wire: MessagePack of tagged, frozen Structs that refuse unknown fields.

Evolution rule: append optional fields only; raise `PROTOCOL` when a peer of the old version must not be understood.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from broker.protocol.errors import PromptTunerError, ProtocolMismatch
from broker.protocol.rows import PoolRow, RequestRow
from broker.protocol.spec import Digest, Frozen, Name, RequestId, RequestIds, RequestSpec
from broker.protocol.states import RequestState

PROTOCOL = 1


class Message(Frozen, frozen=True, tag=True):
    """The base of what travels alone."""


# --- login node -> broker -------------------------------------------------------------------------------------------


class Submit(Message, frozen=True):
    """Acknowledged with `Submitted` only when it is on disk. `submit_key` makes a re-sent submission the same one."""

    spec: RequestSpec
    submit_key: Annotated[str, Meta(min_length=16, max_length=64)]
    blobs: dict[Digest, bytes]  # the canonical JSON Lines of `spec.train` and `spec.eval`
    test_only: bool = False


class Queue(Message, frozen=True):
    """The requests that have not ended, plus those that ended within `ended_within_s`."""

    ids: RequestIds = []
    ended_within_s: float = 0.0


class Cancel(Message, frozen=True):
    """Cancels by id, or everything of the caller that matches all filters given."""

    ids: RequestIds = []
    job_name: str | None = None
    account: str | None = None
    partition: str | None = None
    state: RequestState | None = None
    mine: bool = False  # without ids: the caller really means all of its own that match


class Accounting(Message, frozen=True):
    """Finished and running requests whose time overlaps [start, end]."""

    ids: RequestIds = []
    start_unix_s: float = 0.0
    end_unix_s: float | None = None


class Info(Message, frozen=True):
    """Pools, allocations and the broker itself."""


class Fetch(Message, frozen=True):
    """The result files of a finished request."""

    id: RequestId


class Watch(Message, frozen=True):
    """Streams `Update`s of these requests to this socket until each has ended. Sent again now and then, since a watch
    does not outlive the broker."""

    ids: RequestIds


class Shutdown(Message, frozen=True):
    """Admins only: the broker stops, and its workers too, unless they are to wait for the next broker."""

    end_workers: bool = True


# --- broker -> login node -------------------------------------------------------------------------------------------


class ErrorReply(Message, frozen=True):
    """A refusal; `code` names the class of `broker.protocol.errors`."""

    code: str
    message: str
    hint: str = ""


class Submitted(Message, frozen=True):
    id: int  # 0 for --test-only
    predicted_finish_unix_s: float | None
    deadline_unix_s: float | None
    cluster: str
    note: str = ""  # why a deadline is likely missed, if it is


class Requests(Message, frozen=True):
    """The answer to `Queue` and `Accounting`."""

    rows: list[RequestRow]
    cluster: str = ""


class Cancelled(Message, frozen=True):
    ids: list[int]
    already_ended: list[int] = []


class InfoReply(Message, frozen=True):
    cluster: str
    version: str
    backend: str
    mode: str
    pid: int
    up_since_unix_s: float
    active_requests: int
    rss_mb: float
    pools: list[PoolRow]


class FetchReply(Message, frozen=True):
    id: int
    files: dict[str, bytes]


class ShuttingDown(Message, frozen=True):
    workers: int


class Update(Message, frozen=True):
    row: RequestRow


# --- worker -> broker -----------------------------------------------------------------------------------------------


class Running(Frozen, frozen=True):
    request_id: RequestId
    attempt: int


class Register(Message, frozen=True):
    """A worker's first word, and again whenever the broker says it does not know it."""

    allocation: Name
    key: str
    incarnation: str  # drawn by the process at its start; another one is another holder of the slot
    job_id: str
    restart_count: int
    host: str
    gpus: str
    pid: int
    end_unix_s: float  # when its allocation ends; 0 for unknown
    running: list[Running]
    ready: bool


class Heartbeat(Message, frozen=True):
    epoch: int
    rss_mb: float = 0.0
    models: list[Name] = []  # loaded base models: a request for one of these waits for no load


class Profile(Frozen, frozen=True):
    """Seconds of one training step of K requests, measured at warm-up: base_s + per_request_s * K. And its memory."""

    base_s: float
    per_request_s: float
    bytes_per_token: float = 0.0  # that a forward and backward pass holds; virtual tokens and padding count
    bytes_per_request: float = 0.0  # beside its tokens: prompt, optimizer state, the prompt's keys and values


class Ready(Message, frozen=True):
    """One real training step ran. `phases_s` times each part of the start."""

    epoch: int
    phases_s: dict[str, float]
    profile: Profile


class Progress(Message, frozen=True):
    epoch: int
    request_id: RequestId
    attempt: int
    step: int
    loss: float | None = None
    score: float | None = None
    remaining_s: float | None = None
    start: str = ""
    lookup_s: float = 0.0
    first_step_unix_s: float = 0.0
    step_id: str = ""


class Ended(Message, frozen=True):
    """The end of one attempt. The worker keeps it and says it again until `EndedAck`."""

    epoch: int
    request_id: RequestId
    attempt: int
    state: RequestState
    step: int
    loss: float | None = None
    score: float | None = None
    error: str = ""
    files: dict[str, bytes] = {}


class Leaving(Message, frozen=True):
    """The worker takes nothing new (signal, end of its allocation, failure) and gives these attempts back."""

    epoch: int
    reason: str
    given_back: list[Running] = []
    final: bool = False  # it exits now
    restarting: bool = False  # a new trainer is being started: `Ready` will follow


# --- broker -> worker -----------------------------------------------------------------------------------------------


class Registered(Message, frozen=True):
    epoch: int
    drop: list[Running] = []  # attempts that the broker has given to others or ended


class HeartbeatAck(Message, frozen=True):
    epoch: int


class Reregister(Message, frozen=True):
    """The broker does not know this peer or its epoch: say `Register` again."""

    reason: str


class Assign(Message, frozen=True):
    request_id: RequestId
    attempt: int
    user: str
    uid: int
    account: str
    spec: RequestSpec
    train: bytes
    eval: bytes | None


class Stop(Message, frozen=True):
    request_id: RequestId
    attempt: int
    reason: str


class Drain(Message, frozen=True):
    """Take nothing new; give running requests back with their checkpoints and exit."""

    reason: str


class EndedAck(Message, frozen=True):
    request_id: RequestId
    attempt: int


class Goodbye(Message, frozen=True):
    """The slot is not this worker's (any more): exit at once."""

    reason: str


# --- framing --------------------------------------------------------------------------------------------------------

ClientRequest = Submit | Queue | Cancel | Accounting | Info | Fetch | Watch | Shutdown
ClientReply = ErrorReply | Submitted | Requests | Cancelled | InfoReply | FetchReply | Update | ShuttingDown
FromWorker = Register | Heartbeat | Ready | Progress | Ended | Leaving
ToWorker = ErrorReply | Registered | HeartbeatAck | Reregister | Assign | Stop | Drain | EndedAck | Goodbye

M = TypeVar("M")
_encoder = msgspec.msgpack.Encoder()
client_request_decoder: msgspec.msgpack.Decoder[ClientRequest] = msgspec.msgpack.Decoder(ClientRequest)
client_reply_decoder: msgspec.msgpack.Decoder[ClientReply] = msgspec.msgpack.Decoder(ClientReply)
from_worker_decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
to_worker_decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)

_HEADER = b"PT%d" % PROTOCOL


def pack(message: Message) -> list[bytes]:
    """The frames of one message: the protocol's version, then the body."""
    return [_HEADER, _encoder.encode(message)]


def unpack(frames: list[bytes], decoder: msgspec.msgpack.Decoder[M]) -> M:
    """The message in `frames`.

    Raises `ProtocolMismatch` for another version and `PromptTunerError` for anything that is no message of `decoder`.
    """
    if len(frames) < 2 or not frames[0].startswith(b"PT") or len(frames[0]) > 8:
        raise PromptTunerError("not a PromptTuner message")
    if frames[0] != _HEADER:
        theirs = frames[0][2:].decode("ascii", "replace")
        raise ProtocolMismatch(
            f"the peer speaks protocol version {theirs}, this side speaks {PROTOCOL}",
            "use commands, workers and broker of one release",
        )
    try:
        return decoder.decode(frames[1])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PromptTunerError(f"malformed message: {error}") from None

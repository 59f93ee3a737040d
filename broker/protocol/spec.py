"""What a user asks for, and the types that its parts are checked by wherever they arrive."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from broker.protocol.states import Init, Metric, OnMiss, Rule, Schedule, Share

Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
Text = Annotated[str, Meta(max_length=4096, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f]*\Z")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
RequestId = Annotated[int, Meta(ge=1, le=2**63 - 1)]
AllocationId = Annotated[int, Meta(ge=1, le=2**63 - 1)]
RequestIds = Annotated[list[RequestId], Meta(max_length=20_000)]  # each one is a look into the journal
INPUT_FIELD = "{input}"
_NO_FIELD = r"(?:(?!\{input\})[^\x00-\x08\x0b-\x1f\x7f])*"
# The field exactly once. It is replaced, never formatted: other braces are plain text.
Verbalizer = Annotated[str, Meta(max_length=4096, pattern=rf"^{_NO_FIELD}\{{input\}}{_NO_FIELD}\Z")]
UnixS = Annotated[float, Meta(ge=0, le=253402300799)]


class Frozen(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The base of every value here."""


class RequestSpec(Frozen, frozen=True):
    """One tuning request as its user worded it: data by digest, hyper-parameters, target, deadline. No code, no
    paths."""

    model: Name
    train: Digest
    eval: Digest | None = None  # None: a split of the training rows
    job_name: Name = "prompt"
    account: Name | None = None  # None: the user's default account
    partition: Name | None = None
    qos: Name | None = None
    comment: Text = ""
    virtual_tokens: Annotated[int, Meta(ge=1, le=512)] = 16
    init: Init = Init.BANK
    init_text: Text = ""
    metric: Metric = Metric.LOSS
    target_score: Annotated[float, Meta(ge=-1e9, le=1e9)] | None = None
    max_steps: Annotated[int, Meta(ge=1, le=1_000_000)] = 250
    eval_every: Annotated[int, Meta(ge=1, le=10_000)] = 5
    batch_size: Annotated[int, Meta(ge=1, le=1024)] = 8
    rate: Annotated[float, Meta(gt=0, le=100)] = 0.3  # of each virtual token's own size, a step (dimensionless)
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    deadline_unix_s: UnixS | None = None
    on_miss: OnMiss = OnMiss.CONTINUE
    share: Share = Share.PRIVATE
    rule: Rule = Rule.SCALED  # with ADAMW, `rate` is the plain learning rate
    weight_decay: Annotated[float, Meta(ge=0, le=100)] = 0.0
    clip_norm: Annotated[float, Meta(gt=0, le=1e9)] | None = None  # of the request's own gradient
    schedule: Schedule = Schedule.CONSTANT
    warmup_steps: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None  # None: the rule's own
    accumulate_steps: Annotated[int, Meta(ge=1, le=1024)] = 1  # batches in each step
    epochs: Annotated[float, Meta(gt=0, le=1_000_000)] | None = None  # ends there, or at max_steps if that is sooner
    patience: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None  # evaluations without a better prompt
    verbalizer: Verbalizer = INPUT_FIELD  # the words around each input, which stands where the field does
    max_input_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None  # a longer input keeps its end
    max_target_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None  # a longer target is refused


class Identity(Frozen, frozen=True):
    """Who a message is from, as the authenticator (never the message) says."""

    uid: int
    user: str
    admin: bool = False

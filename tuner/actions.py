"""What a supervisor can be told to do."""

from __future__ import annotations

from msgspec import Struct

from broker.protocol.messages import Message, Profile
from tuner import link


class Action(Struct, frozen=True):
    """The base of what the shell does."""


class ToBroker(Action, frozen=True):
    message: Message


class ToTrainer(Action, frozen=True):
    message: link.ToTrainer


class StartTrainer(Action, frozen=True):
    profile: Profile | None = None  # what an earlier trainer of this worker has measured


class StopTrainer(Action, frozen=True):
    """At once, without its checkpoints."""


class StartStep(Action, frozen=True):
    request_id: int
    attempt: int
    user: str


class EndStep(Action, frozen=True):
    request_id: int
    attempt: int
    ok: bool


class Exit(Action, frozen=True):
    code: int

"""The words between a worker's supervisor and its trainer, both of one release and on one host."""

from __future__ import annotations

import msgspec

from broker.protocol.messages import Assign, Ended, Message, Profile, Progress, Running, Stop

EPOCH_UNKNOWN = 0  # the trainer knows no epoch: the supervisor fills it in


class Loaded(Message, frozen=True):
    """One real training step ran. `phases_s` times each part of the trainer's start."""

    phases_s: dict[str, float]
    profile: Profile


class Resident(Message, frozen=True):
    """These base models are loaded."""

    models: list[str]


class Unloadable(Message, frozen=True):
    """The base model cannot be used; another try would end the same way."""

    reason: str


class GiveBack(Message, frozen=True):
    """Write checkpoints, say `GaveBack` and exit."""


class GaveBack(Message, frozen=True):
    """These attempts' checkpoints are on disk; nothing runs any more."""

    running: list[Running]


FromTrainer = Loaded | Resident | Unloadable | Progress | Ended | GaveBack
ToTrainer = Assign | Stop | GiveBack

from_trainer_decoder: msgspec.msgpack.Decoder[FromTrainer] = msgspec.msgpack.Decoder(FromTrainer)
to_trainer_decoder: msgspec.msgpack.Decoder[ToTrainer] = msgspec.msgpack.Decoder(ToTrainer)
encode = msgspec.msgpack.Encoder().encode

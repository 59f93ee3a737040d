"""What the bank knows about one tuned prompt."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


class Entry(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One published prompt: what it is for, whose it is, who may start from it, and how good it became."""

    digest: Digest  # sha256 of the prompt's file; the store fills it
    base_digest: Digest  # of the base model that it was tuned on
    virtual_tokens: Annotated[int, Meta(ge=1, le=4096)]
    hidden_size: Annotated[int, Meta(ge=1, le=1_000_000)]
    uid: int
    user: str
    account: str
    share: Literal["private", "account", "all"]
    metric: str
    score: float
    loss: float  # of the prompt on its own evaluation rows
    steps: int
    start: str  # which initial prompt it grew from
    created_unix_s: float
    converged: bool  # stalled prompts make stalled children: only converged ones start a request
    job_name: str = ""

    def visible_to(self, uid: int, account: str) -> bool:
        """Whether this user, charging this account, may start from the prompt."""
        return self.uid == uid or self.share == "all" or (self.share == "account" and self.account == account)


_decoder = msgspec.json.Decoder(Entry)


def encode(entry: Entry) -> bytes:
    return msgspec.json.encode(entry)


def decode(data: bytes) -> Entry:
    """The entry in `data`. Raises `msgspec.MsgspecError` for anything else."""
    return _decoder.decode(data)

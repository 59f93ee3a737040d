"""One turn of the loop: what was gathered, and what goes out once it is on disk."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct, field

from broker.core.commands import AnyCommand
from broker.core.step import step
from broker.protocol.messages import Message
from broker.state.events import AnyEvent, Now
from broker.state.model import State
from broker.store.journal import Batch


class Turn(Struct):
    """Collects events, commands and replies. Nothing leaves before `Journal.commit` of `batch` has returned."""

    state: State
    now: Now
    batch: Batch = field(default_factory=Batch)
    commands: list[AnyCommand] = field(default_factory=list)
    replies: list[tuple[bytes, Callable[[], Message]]] = field(default_factory=list)  # to login nodes
    moved: set[int] = field(default_factory=set)  # requests whose watchers want to know
    stop: bool = False  # an admin wants the broker to end
    end_workers: bool = False  # ... and its workers with it

    def apply(self, event: AnyEvent) -> None:
        """Steps the core, and notes the event for the journal unless it repeats by itself."""
        self.commands += step(self.state, event, self.now)
        if not event.ephemeral:
            self.batch.events.append((self.now.unix_s, event))
        request_id = getattr(event, "request_id", 0)
        if request_id:
            self.moved.add(request_id)

    def reply(self, peer: bytes, message: Message) -> None:
        self.replies.append((peer, lambda: message))

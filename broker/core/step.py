"""The one way in which the broker's knowledge changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from broker.core import allocations, requests
from broker.core.commands import AnyCommand
from broker.state import events
from broker.state.events import AnyEvent, Now
from broker.state.model import State

_TRANSITIONS: dict[type[events.Event], Callable[[State, Any, Now], list[AnyCommand]]] = {
    events.RequestSubmitted: requests.submitted,
    events.RequestPlaced: requests.placed,
    events.RequestProgressed: requests.progressed,
    events.RequestStarted: requests.progressed,
    events.RequestEnded: requests.ended,
    events.RequestCancelled: requests.cancelled,
    events.RequestDropped: requests.dropped,
    events.AllocationOrdered: allocations.ordered,
    events.AllocationSubmitted: allocations.submitted,
    events.AllocationRefused: allocations.refused,
    events.AllocationObserved: allocations.observed,
    events.AllocationDrained: allocations.drained,
    events.WorkerRegistered: allocations.registered,
    events.WorkerReady: allocations.ready,
    events.WorkerLeaving: allocations.leaving,
    events.WorkerHeard: allocations.heard,
    events.WorkerLost: allocations.lost,
}


def step(state: State, event: AnyEvent, now: Now) -> list[AnyCommand]:
    """Applies one event to `state` and returns what to do about it, to be done once the event is on disk.

    Deterministic: the same state, event and `now` give the same state and commands. No clock, no I/O.
    """
    return _TRANSITIONS[type(event)](state, event, now)

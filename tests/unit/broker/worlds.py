"""A small site under a clock that tests move by hand, and short words for what happens in it."""

from __future__ import annotations

from typing import Any

import msgspec

from broker.allocations import JobReport, JobState
from broker.core.admission import admit, enlist
from broker.core.commands import AnyCommand
from broker.core.schedule import decide, observe
from broker.core.step import step
from broker.protocol.config import Duration, LimitsConfig, ModelConfig, PoolConfig, SiteConfig
from broker.protocol.messages import Goodbye, Profile, Register, Running, Submit
from broker.protocol.spec import Identity, RequestSpec
from broker.protocol.states import RequestState
from broker.state import events
from broker.state.events import AnyEvent, Now
from broker.state.model import Request, State

ALICE = Identity(uid=1001, user="alice")
BOB = Identity(uid=1002, user="bob")
ADMIN = Identity(uid=0, user="root", admin=True)
DIGEST = "0" * 64
EPOCH_UNIX_S, EPOCH_MONO_S = 1_000_000.0, 1_000.0


def pool(**fields: Any) -> PoolConfig:
    """A pool of the model `tiny`."""
    idle_window = Duration(fields.pop("idle_window", 300))
    return PoolConfig(**({"model": "tiny", "max_workers": 2, "slots": 2} | fields), idle_window=idle_window)


def site(limits: LimitsConfig | None = None, **pools: PoolConfig) -> SiteConfig:
    """A site with these pools; each model that they name is known, and `unserved` besides."""
    named = pools or {"a": pool()}
    models = {p.model for p in named.values()} | {"unserved"}
    return SiteConfig(
        models={m: ModelConfig(path=f"/models/{m}") for m in models}, pools=named, limits=limits or LimitsConfig()
    )


def spec(**fields: Any) -> RequestSpec:
    return RequestSpec(**({"model": "tiny", "train": DIGEST} | fields))


def encoded(value: Any) -> bytes:
    """A form in which two states can be compared."""
    return msgspec.msgpack.encode(value, enc_hook=float)


class World:
    """A state, its clock, the journal of its events, and the requests that ended."""

    def __init__(self, config: SiteConfig | None = None) -> None:
        self.state = State(site=config or site(), tag="cafe0001")
        self.now = Now(EPOCH_UNIX_S, EPOCH_MONO_S)
        self.journal: list[tuple[Now, AnyEvent]] = []
        self.ended: dict[int, Request] = {}
        self._keys = 0

    def tick(self, seconds: float) -> None:
        self.now = Now(self.now.unix_s + seconds, self.now.mono_s + seconds)

    def apply(self, event: AnyEvent) -> list[AnyCommand]:
        commands = step(self.state, event, self.now)
        if not event.ephemeral:
            self.journal.append((self.now, event))
        for request in self.state.touched_requests.values():
            if request.state.final:
                self.ended.setdefault(request.id, request)
        return commands

    def admit(self, caller: Identity = ALICE, **fields: Any) -> int:
        self._keys += 1
        message = Submit(spec=spec(**fields), submit_key=f"key-{self._keys:016}", blobs={})
        event = admit(self.state, message, caller, self.now)
        self.apply(event)
        return event.request_id

    def decide(self) -> list[AnyEvent]:
        """Looks at the whole state once, and applies what was decided."""
        decided = decide(self.state, self.now)
        for event in decided:
            self.apply(event)
        return decided

    def order(self, name: str = "a", job: bool = True) -> int:
        """An allocation of this pool, in Slurm's queue if `job`."""
        number = self.state.counters.allocation_id + 1
        self.apply(
            events.AllocationOrdered(
                allocation_id=number, name=f"pt-{name}-{number}-cafe0001", pool=name, reason="test"
            )
        )
        if job:
            self.apply(events.AllocationSubmitted(allocation_id=number, job_id=f"j{number}"))
        return number

    def register(
        self, allocation_id: int, incarnation: str = "one", running: list[Running] | None = None
    ) -> list[AnyCommand] | Goodbye:
        allocation = self.state.allocations[allocation_id]
        message = Register(
            allocation=allocation.name,
            key="right",
            incarnation=incarnation,
            job_id=allocation.job_id,
            restart_count=0,
            host="node1",
            gpus="0",
            pid=1,
            end_unix_s=0.0,
            running=running or [],
            ready=False,
        )
        answer = enlist(self.state, message, "right", 7)
        return answer if isinstance(answer, Goodbye) else self.apply(answer)

    def ready(self, allocation_id: int, step_s: float = 0.1, per_request_s: float = 0.0) -> None:
        self.apply(
            events.WorkerReady(
                allocation_id=allocation_id,
                epoch=self.state.allocations[allocation_id].epoch,
                phases_s={"imports": 1.0},
                profile=Profile(base_s=step_s, per_request_s=per_request_s),
            )
        )

    def worker(self, name: str = "a", step_s: float = 0.1, per_request_s: float = 0.0) -> int:
        """A warm worker of this pool."""
        number = self.order(name)
        assert not isinstance(self.register(number, f"worker-{number}"), Goodbye)
        self.ready(number, step_s, per_request_s)
        return number

    def finish(self, request_id: int, state: RequestState = RequestState.COMPLETED, **fields: Any) -> list[AnyCommand]:
        """The end of the request's current attempt, as its worker tells it."""
        request = self.state.requests[request_id]
        word = {
            "allocation_id": request.allocation_id,
            "epoch": self.state.allocations[request.allocation_id].epoch,
            "attempt": request.attempt,
            "step": request.spec.max_steps,
        }
        return self.apply(events.RequestEnded(request_id=request_id, state=state, **(word | fields)))

    def poll(self, *reports: JobReport, in_flight: frozenset[int] = frozenset()) -> list[AnyCommand]:
        """What one poll of all jobs leads to."""
        happened, commands = observe(self.state, list(reports), in_flight)
        for event in happened:
            commands = commands + self.apply(event)
        return commands

    def report(self, allocation_id: int, state: JobState, **fields: Any) -> JobReport:
        allocation = self.state.allocations[allocation_id]
        return JobReport(**({"name": allocation.name, "job_id": f"j{allocation_id}", "state": state} | fields))

    def view(self) -> dict[str, Any]:
        """All that two equal states share; `site` and `accounts` come from outside."""
        state = self.state
        return {
            "requests": state.requests,
            "allocations": state.allocations,
            "counters": state.counters,
            "learned": state.learned,
            "health": state.health,
            "by_key": state.by_key,
            "outlook": state.outlook,
        }

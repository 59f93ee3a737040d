"""Whatever happens, in whatever order: what the core promises about requests and allocations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.allocations import JobReport, JobState
from broker.core.commands import SendEndedAck
from broker.core.schedule import decide, recover
from broker.core.step import step
from broker.protocol.messages import Goodbye, Running
from broker.protocol.states import AllocationState, OnMiss, RequestState
from broker.state import events
from broker.state.model import State
from tests.unit.broker.worlds import EPOCH_MONO_S, World, encoded, pool, site

SITE = site(
    a=pool(max_workers=3, slots=2, min_workers=1, idle_window=60),
    b=pool(model="other", max_workers=2, slots=3, gpus_per_worker=4, idle_window=20),
)
# What a replay of the journal does not give back: it repeats by itself, or counts from the broker's start.
UNJOURNALLED_OF_REQUEST = ("step", "loss", "score", "start", "lookup_s", "reason", "predicted_finish_unix_s")
UNJOURNALLED_OF_ALLOCATION = (
    "connected",
    "rss_mb",
    "heard_mono_s",
    "draining_since_mono_s",
    "idle_since_mono_s",
    "accrued_mono_s",
)
picks = st.integers(0, 1000)


class AnythingHappens(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(SITE)
        self.acknowledged: set[int] = set()
        self.lives: dict[int, list[float]] = {}  # allocation -> [ordered, last seen], monotonic
        self.gpus: dict[int, int] = {}

    @property
    def state(self) -> State:
        return self.world.state

    def pick(self, among: Any, number: int) -> Any:
        options = sorted(among)
        return options[number % len(options)] if options else None

    # --- what users do ----------------------------------------------------------------------------------------------

    @rule(
        model=st.sampled_from(["tiny", "other"]),
        slo_s=st.none() | st.floats(1, 500),
        on_miss=st.sampled_from([OnMiss.CONTINUE, OnMiss.DROP]),
        steps=st.integers(1, 5000),
    )
    def submit(self, model: str, slo_s: float | None, on_miss: OnMiss, steps: int) -> None:
        deadline_unix_s = None if slo_s is None else self.world.now.unix_s + slo_s
        number = self.world.admit(model=model, deadline_unix_s=deadline_unix_s, on_miss=on_miss, max_steps=steps)
        assert number not in self.acknowledged
        self.acknowledged.add(number)

    @precondition(lambda self: self.state.requests)
    @rule(which=picks)
    def cancel(self, which: int) -> None:
        self.world.apply(events.RequestCancelled(request_id=self.pick(self.state.requests, which), by_uid=1001))

    # --- what the broker does ---------------------------------------------------------------------------------------

    @rule(seconds=st.floats(0.0, 150.0))
    def tick(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule()
    def look(self) -> None:
        before, twin = encoded(self.world.view()), copy.deepcopy(self.state)
        decided = decide(twin, self.world.now)
        assert encoded(self.world.view()) == before, "a look at a copy changed the state"
        assert encoded(self.world.decide()) == encoded(decided)

    @rule()
    def restart(self) -> None:
        recover(self.state, self.world.now)

    # --- what Slurm does --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.state.allocations)
    @rule(which=picks, accepted=st.booleans())
    def answer_order(self, which: int, accepted: bool) -> None:
        allocation = self.state.allocations[self.pick(self.state.allocations, which)]
        if allocation.job_id:
            return
        if accepted:
            self.world.apply(events.AllocationSubmitted(allocation_id=allocation.id, job_id=f"j{allocation.id}"))
        else:
            self.world.apply(events.AllocationRefused(allocation_id=allocation.id, error="bad account"))

    @rule(states=st.lists(st.sampled_from([*JobState, None]), min_size=6, max_size=6))
    def poll(self, states: list[JobState | None]) -> None:
        reports: list[JobReport] = []
        known = [a for a in self.state.allocations.values() if a.job_id]
        for allocation, job_state in zip(known, states * 3, strict=False):
            if job_state is not None:
                reports.append(self.world.report(allocation.id, job_state, reason="NODE_FAIL"))
        self.world.poll(*reports)

    # --- what workers do --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.state.allocations)
    @rule(which=picks, incarnation=st.sampled_from(["one", "two"]), keeps=st.booleans())
    def register(self, which: int, incarnation: str, keeps: bool) -> None:
        number = self.pick(self.state.allocations, which)
        allocation = self.state.allocations[number]
        running = [Running(request_id=i, attempt=a) for i, a in allocation.running.items()] if keeps else []
        epoch, held, same = allocation.epoch, dict(allocation.running), allocation.incarnation == incarnation
        if isinstance(self.world.register(number, incarnation, running), Goodbye):
            assert (allocation.epoch, allocation.running) == (epoch, held)
        elif same:
            assert (allocation.epoch, allocation.running) == (epoch, held), "the same process keeps what it holds"
        else:
            assert allocation.epoch > epoch
            assert not allocation.running, "another process inherits nothing"

    @precondition(lambda self: self.state.allocations)
    @rule(which=picks)
    def ready(self, which: int) -> None:
        number = self.pick(self.state.allocations, which)
        if self.state.allocations[number].epoch:
            self.world.ready(number)

    @precondition(lambda self: any(a.running for a in self.state.allocations.values()))
    @rule(which=picks, at=st.integers(0, 5000), older=st.integers(0, 1))
    def progress(self, which: int, at: int, older: int) -> None:
        request = self._running(which)
        new = not request.first_step_unix_s and at > 0
        kind = events.RequestStarted if new else events.RequestProgressed
        before = encoded(self.world.view())
        self.world.apply(
            kind(
                allocation_id=request.allocation_id,
                request_id=request.id,
                attempt=request.attempt - older,
                step=at,
                loss=1.0,
                first_step_unix_s=self.world.now.unix_s if new else 0.0,
            )
        )
        assert not older or encoded(self.world.view()) == before

    @precondition(lambda self: any(a.running for a in self.state.allocations.values()))
    @rule(
        which=picks,
        stale=st.sampled_from(["", "", "attempt", "epoch", "allocation"]),
        state=st.sampled_from([s for s in RequestState if s.final]),
    )
    def end(self, which: int, stale: str, state: RequestState) -> None:
        request = self._running(which)
        fields: dict[str, Any] = {}
        if stale == "attempt":
            fields = {"attempt": request.attempt - 1}
        elif stale == "epoch":
            fields = {"epoch": self.state.allocations[request.allocation_id].epoch - 1}
        elif stale == "allocation":
            fields = {"allocation_id": request.allocation_id + 1}
        before = encoded(self.world.view())
        commands = self.world.finish(request.id, state, **fields)
        assert any(isinstance(c, SendEndedAck) for c in commands), "the worker would say it for ever"
        if stale:
            assert encoded(self.world.view()) == before, "a stale result changed something"
            assert len(commands) == 1
        else:
            assert self.world.ended[request.id].state is state

    @precondition(lambda self: self.state.allocations)
    @rule(which=picks, final=st.booleans(), restarting=st.booleans(), everything=st.booleans())
    def leave(self, which: int, final: bool, restarting: bool, everything: bool) -> None:
        allocation = self.state.allocations[self.pick(self.state.allocations, which)]
        if not allocation.epoch:
            return
        back = [Running(request_id=i, attempt=a) for i, a in allocation.running.items()] if everything else []
        drained = allocation.state is AllocationState.DRAINING
        self.world.apply(
            events.WorkerLeaving(
                allocation_id=allocation.id,
                epoch=allocation.epoch,
                reason="SIGTERM",
                given_back=back,
                final=final and not restarting,
                restarting=restarting,
            )
        )
        assert not drained or allocation.state is AllocationState.DRAINING, "a drained allocation served again"

    @precondition(lambda self: self.state.allocations)
    @rule(which=picks)
    def hear(self, which: int) -> None:
        self.world.apply(events.WorkerHeard(allocation_id=self.pick(self.state.allocations, which), rss_mb=10.0))

    @precondition(lambda self: self.state.allocations)
    @rule(which=picks)
    def lose(self, which: int) -> None:
        self.world.apply(events.WorkerLost(allocation_id=self.pick(self.state.allocations, which), reason="silent"))

    def _running(self, which: int) -> Any:
        running = [i for a in self.state.allocations.values() for i in a.running]
        return self.state.requests[self.pick(running, which)]

    # --- what is always so ------------------------------------------------------------------------------------------

    @invariant()
    def an_acknowledged_request_is_open_or_ended_once(self) -> None:
        assert self.state.requests.keys() | self.world.ended.keys() == self.acknowledged
        assert not self.state.requests.keys() & self.world.ended.keys()
        assert all(r.state.final and r.end_unix_s for r in self.world.ended.values())
        assert not any(r.state.final for r in self.state.requests.values())
        assert self.state.by_key == {r.submit_key: r.id for r in self.state.requests.values()}

    @invariant()
    def requests_and_allocations_agree_on_who_runs_where(self) -> None:
        held = {(i, a.id, attempt) for a in self.state.allocations.values() for i, attempt in a.running.items()}
        told = {(r.id, r.allocation_id, r.attempt) for r in self.state.requests.values() if r.allocation_id}
        assert held == told
        for request in self.state.requests.values():
            assert (request.state is RequestState.RUNNING) == bool(request.allocation_id)
            assert not request.allocation_id or request.pool == self.state.allocations[request.allocation_id].pool

    @invariant()
    def no_cap_is_exceeded(self) -> None:
        for name, config in SITE.pools.items():
            held = self.state.allocations_of(name)
            assert len(held) <= config.max_workers
            assert all(len(a.running) <= config.slots for a in held)

    @invariant()
    def no_more_gpu_seconds_are_booked_than_allocations_had(self) -> None:
        for allocation in self.state.allocations.values():
            life = self.lives.setdefault(allocation.id, [self.world.now.mono_s, 0.0])
            self.gpus[allocation.id] = SITE.pools[allocation.pool].gpus_per_worker
            life[1] = self.world.now.mono_s
        # An allocation that ended since then did so at this instant, at the latest.
        had = sum((max(end, start) - start) * self.gpus[i] for i, (start, end) in self.lives.items())
        gone = self.lives.keys() - self.state.allocations.keys()
        had += sum((self.world.now.mono_s - self.lives[i][1]) * self.gpus[i] for i in gone)
        booked = sum(r.gpu_s for r in (*self.state.requests.values(), *self.world.ended.values()))
        assert -1e-6 <= booked <= had + 1e-6
        assert all(r.gpu_s >= 0 for r in (*self.state.requests.values(), *self.world.ended.values()))

    def teardown(self) -> None:
        again = State(site=SITE, tag=self.state.tag)
        twin = State(site=SITE, tag=self.state.tag)
        for now, event in self.world.journal:
            assert encoded(step(again, event, now)) == encoded(step(twin, event, now))
        assert encoded([again.requests, again.allocations, again.learned]) == encoded(
            [twin.requests, twin.allocations, twin.learned]
        )
        assert _journalled(again) == _journalled(self.state), "the journal tells another story"


def _journalled(state: State) -> dict[str, Any]:
    def record(value: Any, without: tuple[str, ...]) -> dict[str, Any]:
        return {f: getattr(value, f) for f in value.__struct_fields__ if f not in without}

    return {
        "requests": {i: record(r, UNJOURNALLED_OF_REQUEST) for i, r in state.requests.items()},
        "allocations": {i: record(a, UNJOURNALLED_OF_ALLOCATION) for i, a in state.allocations.items()},
        "counters": state.counters,
        "by_key": state.by_key,
        "health": {k: v for k, v in state.health.items() if v.failures},
    }


AnythingHappens.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestAnythingHappens = AnythingHappens.TestCase


def test_the_clock_of_these_tests_is_set() -> None:
    assert World().now.mono_s == pytest.approx(EPOCH_MONO_S), "a monotonic zero means 'not yet' in the records"

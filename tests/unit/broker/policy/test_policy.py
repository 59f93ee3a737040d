"""What the first policy promises: earliest deadline first, within floor and cap, and no allocation in vain."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.policy.estimate import cold_start_s, remaining_s
from broker.policy.plan import plan
from broker.protocol.states import AllocationState, OnMiss, Reason, RequestState
from broker.state import events
from tests.unit.broker.worlds import World, encoded, pool, site


def orders(world: World) -> list[str]:
    return [reason for _, reason in plan(world.state, world.now).orders]


def learn(world: World, load_s: float = 20.0, queue_s: float = 5.0, name: str = "a") -> None:
    learned = world.state.knowledge(name)
    learned.load_s, learned.queue_s, learned.overhead_s = load_s, queue_s, 0.001


# --- placement
# ----------------------------------------------------------------------------------------------------------


def test_the_earliest_deadline_goes_first_and_none_goes_last() -> None:
    world = World(site(a=pool(slots=1, max_workers=1)))
    world.worker()
    start = world.now.unix_s
    deadlines = [None, start + 900, start + 300, start + 600]
    numbers = [world.admit(deadline_unix_s=d) for d in deadlines]
    order = []
    for _ in numbers:
        world.decide()
        (running,) = [r for r in world.state.requests.values() if r.state is RequestState.RUNNING]
        order.append(running.id)
        world.finish(running.id)
    assert order == [numbers[2], numbers[3], numbers[1], numbers[0]]


def test_equal_deadlines_go_in_the_order_of_submission() -> None:
    world = World(site(a=pool(slots=1)))
    world.worker()
    numbers = [world.admit(deadline_unix_s=world.now.unix_s + 500) for _ in range(3)]
    assert [i for i, _ in plan(world.state, world.now).placements] == numbers[:1]


@pytest.mark.parametrize("state", ["ordered", "pending", "loading", "away", "draining"])
def test_only_a_warm_worker_that_is_there_takes_requests(state: str) -> None:
    world = World()
    number = world.order(job=state != "ordered") if state in ("ordered", "pending", "loading") else world.worker()
    allocation = world.state.allocations[number]
    if state == "loading":
        world.register(number)
    elif state == "away":
        allocation.connected = False
    elif state == "draining":
        world.apply(events.AllocationDrained(allocation_id=number, reason="idle"))
    world.admit()
    assert plan(world.state, world.now).placements == []


def test_sharing_that_costs_nothing_fills_one_worker_before_the_next() -> None:
    world = World(site(a=pool(slots=4)))
    first, second = world.worker(), world.worker()
    numbers = [world.admit() for _ in range(5)]
    placements = plan(world.state, world.now).placements
    assert placements == [(i, first) for i in numbers[:4]] + [(numbers[4], second)]


def test_dear_sharing_spreads_over_idle_workers() -> None:
    world = World(site(a=pool(slots=4)))
    first, second = (world.worker(step_s=0.001, per_request_s=0.1) for _ in range(2))
    for _ in range(2):
        world.admit()
    assert {a for _, a in plan(world.state, world.now).placements} == {first, second}


def test_a_request_joins_no_worker_where_it_would_break_anothers_deadline() -> None:
    world = World(site(a=pool(slots=4, max_workers=1)))
    learn(world)
    world.worker(step_s=0.001, per_request_s=0.1)
    tight = world.admit(max_steps=100, deadline_unix_s=world.now.unix_s + 15)  # alone about 12 s, shared 23
    world.decide()
    assert world.state.requests[tight].state is RequestState.RUNNING
    world.admit(max_steps=100, deadline_unix_s=world.now.unix_s + 500)
    assert plan(world.state, world.now).placements == []
    world.finish(tight)
    assert len(plan(world.state, world.now).placements) == 1


def test_a_request_that_must_not_join_keeps_no_later_one_from_a_free_seat() -> None:
    world = World(site(a=pool(slots=8, max_workers=1)))
    learn(world)
    world.worker(step_s=0.001, per_request_s=0.1)
    world.admit(max_steps=400)  # without a deadline: joining harms it no more than it minds
    world.decide()
    head = world.admit(max_steps=100, deadline_unix_s=world.now.unix_s + 15)  # alone about 12 s, shared 23
    short = world.admit(max_steps=1, deadline_unix_s=world.now.unix_s + 30)
    assert [i for i, _ in plan(world.state, world.now).placements] == [short]
    assert plan(world.state, world.now).reasons.keys() == {head}


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 4),
    workers=st.integers(0, 3),
    deadlines=st.lists(st.none() | st.integers(1, 500), max_size=14),
    per_request_s=st.sampled_from([0.0, 0.01, 0.5]),
)
def test_no_worker_gets_more_than_its_slots_and_at_equal_cost_nobody_waits_for_a_later_deadline(
    slots: int, workers: int, deadlines: list[int | None], per_request_s: float
) -> None:
    world = World(site(a=pool(slots=slots, max_workers=4)))
    for _ in range(workers):
        world.worker(per_request_s=per_request_s)
    for deadline in deadlines:
        world.admit(deadline_unix_s=None if deadline is None else world.now.unix_s + deadline)
    before = encoded(world.view())
    first, second = plan(world.state, world.now), plan(copy.deepcopy(world.state), world.now)
    assert encoded(first) == encoded(second)
    assert encoded(world.view()) == before, "a plan changed the state"
    seated = [i for i, _ in first.placements]
    assert len(set(seated)) == len(seated)
    assert all([a for _, a in first.placements].count(a) <= slots for _, a in first.placements)
    latest_seated = max((world.state.requests[i].deadline_unix_s for i in seated), default=0.0)
    waiting = [r for r in world.state.requests.values() if r.id not in seated]
    if not per_request_s:  # sharing costs nothing: then nothing but the deadline decides
        assert all(r.deadline_unix_s >= latest_seated for r in waiting)
    assert {r.id for r in waiting} == first.reasons.keys() == first.finish_unix_s.keys()
    assert len(first.orders) + workers <= 4


# --- growing
# ------------------------------------------------------------------------------------------------------------


def test_the_floor_is_kept_without_any_request() -> None:
    world = World(site(a=pool(min_workers=2, max_workers=3)))
    assert orders(world) == ["floor", "floor"]
    world.decide()
    assert orders(world) == []


def test_a_lost_worker_of_the_floor_is_replaced_while_the_old_one_still_drains() -> None:
    world = World(site(a=pool(min_workers=1, max_workers=2)))
    number = world.worker()
    world.apply(events.WorkerLost(allocation_id=number, reason="silent"))
    assert orders(world) == ["floor"]


def test_the_first_request_brings_up_one_allocation() -> None:
    world = World()
    world.admit()
    world.decide()
    assert len(world.state.allocations) == 1
    assert orders(world) == []


def test_the_cap_counts_what_waits_and_what_drains() -> None:
    world = World(site(a=pool(max_workers=2)))
    drained, _ = world.worker(), world.order()
    world.apply(events.AllocationDrained(allocation_id=drained, reason="idle"))
    learn(world)
    for _ in range(20):
        world.admit(max_steps=1000, deadline_unix_s=world.now.unix_s + 150)
    assert orders(world) == []
    world.decide()
    assert {r.reason for r in world.state.requests.values()} == {Reason.COLD_START}


def test_one_more_is_ordered_when_a_deadline_would_be_missed_and_it_would_save_it() -> None:
    world = World(site(a=pool(slots=1, max_workers=4)))
    learn(world)
    world.worker()
    world.admit(max_steps=1000)  # about 115 s
    world.decide()
    in_time = world.now.unix_s + 10 + 25 + 115 + 1  # behind a cold start, not behind the running one
    late = world.admit(max_steps=1000, deadline_unix_s=in_time)
    assert orders(world) == [f"the deadline of request {late}"]


def test_none_is_ordered_when_the_worker_there_is_in_time() -> None:
    world = World(site(a=pool(slots=1, max_workers=4)))
    learn(world)
    world.worker()
    world.admit(max_steps=1000)
    world.decide()
    world.admit(max_steps=1000, deadline_unix_s=world.now.unix_s + 300)
    assert orders(world) == []


def test_none_is_ordered_that_would_come_too_late() -> None:
    world = World(site(a=pool(slots=1, max_workers=4)))
    learn(world, load_s=600)
    world.worker()
    world.admit(max_steps=1000)
    world.decide()
    world.admit(max_steps=1000, deadline_unix_s=world.now.unix_s + 150)
    assert orders(world) == []


def test_what_was_seated_in_the_same_look_counts_as_work() -> None:
    """Two at once, one worker: a new worker would come after the first has ended, so it cannot help the second."""
    world = World(site(a=pool(slots=1, max_workers=4)))
    learn(world, load_s=600)
    world.worker()
    for _ in range(2):
        world.admit(max_steps=1000, deadline_unix_s=world.now.unix_s + 150)
    decided = plan(world.state, world.now)
    assert len(decided.placements) == 1
    assert decided.orders == []


def test_as_many_are_ordered_as_deadlines_need_and_no_more() -> None:
    world = World(site(a=pool(slots=1, max_workers=10)))
    learn(world)
    world.worker()
    world.admit(max_steps=1000)
    world.decide()
    for _ in range(3):
        world.admit(max_steps=1000, deadline_unix_s=world.now.unix_s + 160)
    assert len(orders(world)) == 3
    world.decide()
    assert orders(world) == [], "those on their way are counted"


def test_requests_without_a_deadline_wait_for_the_workers_there() -> None:
    world = World(site(a=pool(slots=1, max_workers=4)))
    world.worker()
    for _ in range(10):
        world.admit(max_steps=1000)
    assert orders(world) == []
    world.decide()
    assert {r.reason for r in world.state.requests.values()} == {Reason.NONE, Reason.PRIORITY}


def test_a_paused_pool_orders_nothing_and_says_that_it_is_down() -> None:
    world = World(site(a=pool(min_workers=1)))
    world.apply(events.AllocationRefused(allocation_id=world.order(job=False), error="bad account"))
    number = world.admit()
    assert orders(world) == []
    world.decide()
    assert world.state.requests[number].reason is Reason.POOL_DOWN
    world.tick(301)
    assert orders(world) == ["floor"]


def test_another_pools_pause_holds_up_nobody_else() -> None:
    world = World(site(a=pool(), b=pool(model="other")))
    world.apply(events.AllocationRefused(allocation_id=world.order("b", job=False), error="bad"))
    world.admit()
    assert plan(world.state, world.now).orders == [("a", "first request")]


# --- giving back
# --------------------------------------------------------------------------------------------------------


def test_an_idle_worker_is_given_back_after_the_window_and_not_before() -> None:
    world = World(site(a=pool(idle_window=60)))
    number = world.worker()
    world.tick(59)
    assert plan(world.state, world.now).drains == []
    world.tick(1)
    assert plan(world.state, world.now).drains == [(number, "idle")]


def test_the_window_begins_anew_with_each_request() -> None:
    world = World(site(a=pool(idle_window=60)))
    world.worker()
    request = world.admit()
    world.decide()
    world.tick(100)
    world.apply(events.WorkerHeard(allocation_id=1, rss_mb=1.0))
    assert plan(world.state, world.now).drains == [], "it works"
    world.finish(request)
    world.tick(59)
    assert plan(world.state, world.now).drains == []
    world.tick(2)
    assert len(plan(world.state, world.now).drains) == 1


def test_the_floor_is_never_given_back() -> None:
    world = World(site(a=pool(min_workers=1, max_workers=3, idle_window=60)))
    for _ in range(3):
        world.worker()
    world.tick(100)
    assert len(plan(world.state, world.now).drains) == 2


def test_an_order_that_nobody_needs_any_more_is_cancelled() -> None:
    world = World()
    request = world.admit()
    world.decide()
    world.apply(events.RequestCancelled(request_id=request, by_uid=1))
    assert plan(world.state, world.now).drains == [(1, "no longer needed")]


def test_nothing_is_given_back_while_a_request_waits() -> None:
    world = World(site(a=pool(slots=1, max_workers=1, idle_window=1)))
    world.worker()
    for _ in range(2):
        world.admit()
    world.decide()
    world.tick(50)
    assert plan(world.state, world.now).drains == []


# --- deadlines and predictions
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [False, True])
def test_drop_ends_a_request_at_its_deadline_and_continue_does_not(runs: bool) -> None:
    world = World(site(a=pool(slots=4)))
    if runs:
        world.worker()
    deadline_unix_s = world.now.unix_s + 30
    dropped = world.admit(deadline_unix_s=deadline_unix_s, on_miss=OnMiss.DROP)
    kept = world.admit(deadline_unix_s=deadline_unix_s)
    world.decide()
    world.tick(30)
    world.decide()
    assert dropped in world.state.requests, "not before its time is over"
    world.tick(0.1)
    world.decide()
    assert world.ended[dropped].state is RequestState.DEADLINE
    assert kept in world.state.requests


def test_a_predicted_finish_counts_those_before_it() -> None:
    world = World(site(a=pool(slots=1, max_workers=1)))
    world.worker()
    numbers = [world.admit(max_steps=1000, deadline_unix_s=world.now.unix_s + 1000 + i) for i in range(4)]
    result = plan(world.state, world.now)
    finishes = [result.finish_unix_s[i] for i in numbers[1:]]
    one_s = remaining_s(world.state.requests[numbers[0]], world.state.knowledge("a"), 1)
    assert finishes == pytest.approx([world.now.unix_s + one_s * (i + 2) for i in range(3)])


def test_what_was_seen_replaces_what_was_assumed() -> None:
    world = World()
    number = world.order()
    world.tick(100)
    world.register(number)
    world.tick(50)
    world.ready(number)
    assert cold_start_s(world.state.knowledge("a")) == pytest.approx(150)
    assert world.state.allocations[number].state is AllocationState.WARM

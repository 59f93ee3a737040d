"""What is taken in and what is refused: each with its class, what is wrong, what to do; a refusal changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from broker.allocations import Account
from broker.core.admission import admit, cancellations, check_promise, predict, visible
from broker.protocol.config import LimitsConfig
from broker.protocol.errors import NotFound, PromptTunerError, Refused, UsageError
from broker.protocol.messages import Cancel, Goodbye, Submit
from broker.protocol.spec import Identity
from broker.protocol.states import OnMiss, RequestState
from broker.state.model import Request
from tests.unit.broker.worlds import ADMIN, ALICE, BOB, World, encoded, pool, site, spec

KEY = "k" * 32


def refusal(
    world: World, caller: Identity = ALICE, blobs: dict[str, bytes] | None = None, **fields: Any
) -> PromptTunerError:
    before, touched = encoded(world.view()), set(world.state.touched_requests)
    with pytest.raises(PromptTunerError) as caught:
        admit(world.state, Submit(spec=spec(**fields), submit_key=KEY, blobs=blobs or {}), caller, world.now)
    assert encoded(world.view()) == before
    assert set(world.state.touched_requests) == touched
    return caught.value


@pytest.mark.parametrize(
    ("fields", "kind", "message", "hint"),
    [
        ({"model": "tinny"}, Refused, "unknown model: tinny", "did you mean tiny?"),
        ({"model": "unserved"}, Refused, "no pool serves the model unserved", "ask the site's admin"),
        ({"account": "physic"}, Refused, "account physic is not one of yours", "did you mean physics?"),
        ({"partition": "gpu2"}, Refused, "no pool of the model tiny in partition gpu2", "gpu"),
        ({"qos": "low"}, Refused, "no pool of the model tiny has QOS low", "QOS: high"),
        ({"deadline_unix_s": 999_990.0}, UsageError, "the deadline is 10 s in the past", "--slo"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    fields: dict[str, Any], kind: type[PromptTunerError], message: str, hint: str
) -> None:
    world = World(site(a=pool(partition="gpu", qos="high")))
    world.state.accounts = {"alice": Account(default="physics", allowed=frozenset({"physics", "bio"}))}
    error = refusal(world, **fields)
    assert type(error) is kind
    assert error.message == message
    assert hint in error.hint


def test_a_user_without_an_account_is_refused() -> None:
    world = World()
    world.state.accounts = {"alice": Account(default="physics", allowed=frozenset({"physics"}))}
    error = refusal(world, BOB)
    assert (type(error), error.exit_code) == (Refused, 4)
    assert "bob" in error.message and "sacctmgr" in error.hint


def test_more_data_than_the_site_takes_is_refused_with_both_sizes() -> None:
    error = refusal(World(site(LimitsConfig(data_mb=1))), blobs={"0" * 64: b"x" * (3 << 19)})
    assert type(error) is Refused
    assert error.message == "the data is 1.5 MiB, the site's limit is 1 MiB"


def test_a_user_holds_no_more_than_the_limit_and_others_do_not_count() -> None:
    world = World(site(LimitsConfig(pending_per_user=3)))
    for _ in range(3):
        world.admit(BOB)
    for _ in range(3):
        world.admit()
    error = refusal(world)
    assert type(error) is Refused
    assert error.message == "3 requests of yours are waiting, the site's limit is 3"


def test_a_user_alone_holds_no_more_than_the_limit() -> None:
    world = World(site(LimitsConfig(pending_per_user=3)))
    for _ in range(3):
        world.admit()
    assert "the site's limit is 3" in refusal(world).message


def test_the_account_is_the_users_default_unless_named() -> None:
    world = World()
    world.state.accounts = {"alice": Account(default="physics", allowed=frozenset({"physics", "bio"}))}
    assert world.state.requests[world.admit()].account == "physics"
    assert world.state.requests[world.admit(account="bio")].account == "bio"


def test_the_least_loaded_of_several_pools_is_taken() -> None:
    world = World(site(a=pool(partition="x"), b=pool(partition="y")))
    first = world.state.requests[world.admit()].pool
    assert {first, world.state.requests[world.admit()].pool} == {"a", "b"}
    assert world.state.requests[world.admit(partition="y")].pool == "b"


def test_reject_refuses_what_would_be_late_and_continue_only_says_so() -> None:
    world = World()
    event = admit(world.state, Submit(spec=spec(), submit_key=KEY, blobs={}), ALICE, world.now)
    fields = {"id": event.request_id, "uid": 1, "user": "alice", "account": "x", "pool": "a", "submit_key": KEY}

    def request(**more: Any) -> Request:
        return Request(spec=spec(**more), submit_unix_s=world.now.unix_s, **fields)

    soon = world.now.unix_s + 1
    late = request(deadline_unix_s=soon, on_miss=OnMiss.REJECT)
    with pytest.raises(Refused, match="after the deadline"):
        check_promise(late, predict(world.state, late, world.now))
    tolerant = request(deadline_unix_s=soon)
    assert "after the deadline" in check_promise(tolerant, predict(world.state, tolerant, world.now))
    calm = request(deadline_unix_s=soon + 1e6, on_miss=OnMiss.REJECT)
    assert check_promise(calm, predict(world.state, calm, world.now)) == ""


def test_a_prediction_waits_for_a_seat() -> None:
    world = World(site(a=pool(slots=1, max_workers=1)))
    world.worker()
    world.admit(max_steps=1000)  # about 115 s
    world.decide()
    event = admit(world.state, Submit(spec=spec(max_steps=100), submit_key=KEY, blobs={}), ALICE, world.now)
    probe = Request(
        id=event.request_id,
        spec=event.spec,
        uid=1,
        user="alice",
        account="x",
        pool="a",
        submit_key=KEY,
        submit_unix_s=world.now.unix_s,
    )
    assert predict(world.state, probe, world.now) > world.now.unix_s + 115
    world.finish(1)
    assert predict(world.state, probe, world.now) < world.now.unix_s + 20


# --- cancellations
# ------------------------------------------------------------------------------------------------------


def test_a_cancel_needs_ids_or_the_word_that_all_are_meant() -> None:
    with pytest.raises(UsageError, match="which requests"):
        cancellations(World().state, Cancel(), ALICE)


def test_ids_given_twice_are_cancelled_once() -> None:
    world = World()
    number = world.admit()
    ending, rest = cancellations(world.state, Cancel(ids=[number, number]), ALICE)
    assert ([e.request_id for e in ending], rest) == ([number], [])


def test_nobody_cancels_anothers_requests_but_an_admin() -> None:
    world = World()
    number = world.admit(BOB)
    assert cancellations(world.state, Cancel(ids=[number]), ALICE) == ([], [number])
    assert cancellations(world.state, Cancel(mine=True), ALICE) == ([], [])
    assert [e.request_id for e in cancellations(world.state, Cancel(ids=[number]), ADMIN)[0]] == [number]
    assert cancellations(world.state, Cancel(mine=True), ADMIN) == ([], []), "an admin's own, not everybody's"


@pytest.mark.parametrize(
    ("filters", "matching"),
    [
        ({"job_name": "x"}, 1),
        ({"job_name": "y"}, 0),
        ({"state": RequestState.PENDING}, 2),
        ({"state": RequestState.RUNNING}, 0),
        ({"partition": "local"}, 2),
        ({"account": "other"}, 0),
    ],
)
def test_all_filters_of_a_cancel_must_match(filters: dict[str, Any], matching: int) -> None:
    world = World()
    world.admit(job_name="x")
    world.admit()
    assert len(cancellations(world.state, Cancel(mine=True, **filters), ALICE)[0]) == matching


# --- who sees what, and who holds a slot
# --------------------------------------------------------------------------------


def test_anothers_request_and_no_request_are_told_alike() -> None:
    world = World()
    number = world.admit(BOB)
    with pytest.raises(NotFound) as hidden:
        visible(world.state.requests[number], ALICE, number)
    with pytest.raises(NotFound) as missing:
        visible(None, ALICE, number)
    assert str(hidden.value) == str(missing.value)
    assert hidden.value.exit_code == 6
    assert visible(world.state.requests[number], BOB, number) is visible(world.state.requests[number], ADMIN, number)


def test_a_worker_that_was_given_up_does_not_come_back() -> None:
    world = World()
    number = world.worker()
    world.tick(world.state.site.limits.worker_timeout + 1)
    world.decide()
    assert isinstance(world.register(number, f"worker-{number}"), Goodbye)
    assert isinstance(world.register(number, "its requeued job"), Goodbye)

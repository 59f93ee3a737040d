"""What a request gets in a pack is what a lone, careful run of stock PEFT with torch's own AdamW gives it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from broker.protocol.messages import Assign, Ended
from broker.protocol.states import RequestState
from tuner import ways
from tuner.data import BatchOrder, Example, load_dataset
from tuner.model import Base
from tuner.session import Session
from tuner.start import random_prompt

FAMILIES = ["llama", "gpt2", "qwen2"]
FEW: dict[str, Any] = {
    "phases": [Phase.generate],
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@dataclass
class Lone:
    losses: list[float]  # at each evaluation
    prompt: torch.Tensor  # of the least of them


class StockPeft:
    """Stock PEFT prompt tuning on one base, one request at a time."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._model = copy.deepcopy(base.model)

    def run(self, assign: Assign) -> Lone:
        spec, base = assign.spec, self.base
        data = load_dataset(base, spec, assign.train, assign.eval)
        config = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=spec.virtual_tokens)
        model = peft.get_peft_model(self._model, config)
        model.eval()
        weight = model.prompt_encoder["default"].embedding.weight
        weight.data.copy_(random_prompt(base, spec.virtual_tokens, spec.seed))
        adam = torch.optim.AdamW([weight], lr=spec.rate, weight_decay=spec.weight_decay)
        schedule = self._schedule(adam, assign)
        order = BatchOrder(len(data.train), spec.batch_size * spec.accumulate_steps, spec.seed)
        with torch.no_grad():
            found = [(self._loss(model, data.eval).item(), weight.detach().clone())]
        for step in range(1, spec.max_steps + 1):
            self._loss(model, [data.train[row] for row in order.batch(step - 1)]).backward()
            if spec.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_([weight], spec.clip_norm)
            adam.step()
            adam.zero_grad()
            schedule.step()
            if step % spec.eval_every == 0 or step == spec.max_steps:
                with torch.no_grad():
                    found.append((self._loss(model, data.eval).item(), weight.detach().clone()))
        return Lone([loss for loss, _ in found], min(found, key=lambda each: each[0])[1])

    def _schedule(self, adam: torch.optim.Optimizer, assign: Assign) -> Any:
        spec = assign.spec
        if spec.schedule.value == "constant":
            return torch.optim.lr_scheduler.LambdaLR(adam, lambda _: 1.0)
        make = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
        return make[spec.schedule.value](adam, 0, spec.max_steps)

    @staticmethod
    def _loss(model: Any, rows: list[Example]) -> torch.Tensor:
        width = max(map(len, rows))
        ids = torch.tensor([[*row.tokens, *[0] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            labels[i, len(row) - row.targets : len(row)] = torch.tensor(row.tokens[-row.targets :])
        loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss


@pytest.fixture(scope="module", autouse=True)
def all_ways_in_use() -> Iterator[None]:
    """As on a large model, a pass costs nothing: prompts are shared and rows sorted wherever it saves tokens."""
    patch = pytest.MonkeyPatch()
    patch.setattr(ways, "_PASS_FLOPS_A_LAYER", {})
    yield
    patch.undo()


@pytest.fixture(scope="module")
def sessions(model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    folder = tmp_path_factory.mktemp("sessions")
    found = {}
    for family in FAMILIES:
        found[family] = Session(
            model_path=str(model_dirs[family]),
            bank_dir=folder / "bank",
            checkpoint_dir=folder / family,
            checkpoint_s=1e9,
            slots=16,
        )
        found[family].load()
        assert found[family]._engine._base.ways.shared_prefix
    return found


@pytest.fixture(scope="module")
def stock(bases: dict[str, Base], all_ways_in_use: None) -> dict[str, StockPeft]:
    return {family: StockPeft(base) for family, base in bases.items()}


def drive(session: Session, joins: dict[int, list[Assign]]) -> dict[int, Ended]:
    ended: dict[int, Ended] = {}
    for step in range(400):
        for assign in joins.get(step, []):
            session.join(assign)
        ended |= {said.request_id: said for said in session.step() if isinstance(said, Ended)}
        if not session.busy and step >= max(joins):
            return ended
    raise AssertionError("the session did not come to an end")


def losses_of(ended: Ended) -> list[float]:
    return [point["loss"] for point in json.loads(ended.files["prompttuner.json"])["curve"]]


def prompt_of(ended: Ended) -> torch.Tensor:
    return safetensors.torch.load(ended.files["adapter_model.safetensors"])["prompt_embeddings"]


PLAIN_ADAMW = st.fixed_dictionaries(
    {
        "rule": st.just("adamw"),
        "rate": st.floats(0.002, 0.05),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
        "clip_norm": st.sampled_from([None, 0.1, 10.0]),
        "schedule": st.sampled_from(["constant", "linear", "cosine"]),
        "virtual_tokens": st.integers(1, 9),
        "batch_size": st.integers(1, 6),
        "accumulate_steps": st.integers(1, 2),
        "max_steps": st.integers(3, 12),
        "eval_every": st.integers(2, 5),
        "seed": st.integers(0, 99),
    }
)
JOINING = st.tuples(st.integers(0, 8), st.integers(1, 20), PLAIN_ADAMW)  # before which step, with how many rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("count", "examples"), [(1, 15), (4, 6), (16, 3)])  # the first example is the plainest
def test_every_request_of_a_pack_walks_as_it_would_alone_in_stock_peft(
    sessions: dict[str, Session],
    stock: dict[str, StockPeft],
    make_request: Callable[..., Assign],
    make_rows: Callable[..., bytes],
    family: str,
    count: int,
    examples: int,
) -> None:
    @settings(max_examples=examples, **FEW)
    @given(st.lists(JOINING, min_size=count, max_size=count))
    def check(drawn: list[tuple[int, int, dict[str, Any]]]) -> None:
        joins: dict[int, list[Assign]] = {}
        for i, (step, rows, fields) in enumerate(drawn, 1):
            joins.setdefault(step, []).append(make_request(i, rows=make_rows(rows, first=i), **fields))
        ended = drive(sessions[family], joins)
        for assign in (assign for joined in joins.values() for assign in joined):
            ours, lone = ended[assign.request_id], stock[family].run(assign)
            assert ours.state is RequestState.COMPLETED
            assert losses_of(ours) == pytest.approx(lone.losses, abs=1e-4)
            best = losses_of(ours).index(min(losses_of(ours)))
            if lone.losses[best] == min(lone.losses):  # else two evaluations are equal but for rounding
                assert (prompt_of(ours) - lone.prompt).abs().max().item() < 1e-3

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_suspended_and_resumed_is_bit_equal_to_never_suspended(
    sessions: dict[str, Session], make_request: Callable[..., Assign], family: str
) -> None:
    session = sessions[family]

    @settings(max_examples=8, **FEW)
    @given(PLAIN_ADAMW | st.just({"max_steps": 12}), st.sets(st.integers(1, 11), min_size=1, max_size=4))
    def check(fields: dict[str, Any], stops: set[int]) -> None:
        expected = drive(session, {0: [make_request(**fields)]})[1]
        attempt, ended = 1, None
        session.join(make_request(attempt=attempt, **fields))
        for step in range(1, 13):
            ended = ended or next((said for said in session.step() if isinstance(said, Ended)), None)
            if ended is None and step in stops:
                session.give_back()
                attempt += 1
                session.join(make_request(attempt=attempt, **fields))
        assert ended is not None
        assert losses_of(ended) == losses_of(expected)
        assert torch.equal(prompt_of(ended), prompt_of(expected))

    check()


def test_killed_at_random_points_the_curve_is_that_of_the_unbroken_run(
    sessions: dict[str, Session], make_request: Callable[..., Assign]
) -> None:
    session, chance = sessions["llama"], random.Random(4)
    fields = {"max_steps": 25, "eval_every": 1}
    unbroken = drive(session, {0: [make_request(**fields)]})[1]
    attempt = kills = 0
    while kills < 50:
        attempt += 1
        session.join(make_request(attempt=attempt, **fields))
        ended = None
        while ended is None:
            fate = chance.random()
            if fate < 0.4:
                for run in session._runs.values():
                    session._engine.keep(run)
            elif fate < 0.6:  # kill -9: all that is not on disk is gone
                session._runs.clear()
                kills, attempt = kills + 1, attempt + 1
                session.join(make_request(attempt=attempt, **fields))
            ended = next((said for said in session.step() if isinstance(said, Ended)), None)
        assert losses_of(ended) == pytest.approx(losses_of(unbroken), abs=1e-6)


def hostile(number: int) -> dict[str, Any]:
    """Settings and rows that want to spoil a worker; each kind with what its end must say, or None for any end."""
    kinds: list[dict[str, Any]] = [
        {"rate": 100.0, "told": None},
        {"rule": "adamw", "rate": 100.0, "weight_decay": 100.0, "max_steps": 12, "told": "at step"},
        {"rows": b"", "told": "no training rows"},
        {"rows": b'{"input":"","target":""}\n', "told": "row 1"},
        {"rows": b'{"input":"","target":"a"}\n', "told": None},
        {"rows": b'{"input":"' + b"a " * 100_000 + b'","target":"b"}\n', "told": "fit beside"},
        {"rows": b'{"input":"a","target":"b"}\n' * 40, "told": None},
        {"rows": '{"input":"☃ \\u0000 \U0001f600","target":"☂"}\n'.encode() * 3, "told": None},
        {"rows": b'{"input":"\xff\xfe","target":"a"}\n', "told": "row 1"},
        {"rows": b'{"input":"a"', "told": "row 1"},
        {"virtual_tokens": 512, "told": "fit beside"},
        {"init": "text", "init_text": "", "told": "no tokens"},
    ]
    return kinds[number % len(kinds)]


def test_good_requests_among_many_hostile_ones_end_as_without_them(
    sessions: dict[str, Session], make_request: Callable[..., Assign], make_rows: Callable[..., bytes]
) -> None:
    session = sessions["llama"]
    good = [make_request(i, seed=i, max_steps=8, batch_size=4, rows=make_rows(9, first=i)) for i in range(1, 21)]
    alone = drive(session, {0: good})
    told, joins = {}, {0: list(good)}
    for number in range(200):
        fields = {"batch_size": 2, "max_steps": 6} | hostile(number)
        told[1000 + number] = fields.pop("told")
        joins.setdefault(number % 4, []).append(make_request(1000 + number, **fields))
    among = drive(session, joins)
    for assign in good:
        ours, expected = among[assign.request_id], alone[assign.request_id]
        assert ours.state is RequestState.COMPLETED
        assert losses_of(ours) == pytest.approx(losses_of(expected), abs=1e-4)
        assert (prompt_of(ours) - prompt_of(expected)).abs().max().item() < 1e-3
    for request_id, reason in told.items():
        ended = among[request_id]
        assert ended.state is (RequestState.FAILED if reason or ended.error else RequestState.COMPLETED), ended
        assert (reason or "") in ended.error

"""On the small world that comes with the project, a bank of related prompts saves training steps."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

from broker.protocol.messages import Assign, Ended
from broker.protocol.spec import RequestSpec
from broker.protocol.states import Init
from tuner.session import Session

WORLD = Path(__file__).parents[3] / "examples" / "small_world"


def loaded(directory: Path) -> Session:
    session = Session(
        model_path=str(WORLD / "tiny"),
        bank_dir=directory / "bank",
        checkpoint_dir=directory / "checkpoints",
        checkpoint_s=1e9,
        slots=1,
    )
    session.load()
    return session


def tune(session: Session, task: str, init: Init, seed: int) -> Ended:
    train, evaluation = ((WORLD / "tasks" / f"{task}.{part}.jsonl").read_bytes() for part in ("train", "eval"))
    spec = RequestSpec(model="tiny", train="0" * 64, virtual_tokens=8, init=init, target_score=0.1, seed=seed)
    session.join(
        Assign(request_id=1, attempt=1, user="alice", uid=1, account="a", spec=spec, train=train, eval=evaluation)
    )
    while True:
        for said in session.step():
            if isinstance(said, Ended):
                return said


def test_requests_that_start_from_the_bank_take_fewer_steps_than_random_ones(tmp_path: Path) -> None:
    tasks = json.loads((WORLD / "tasks" / "tasks.json").read_text())
    with_bank, without = loaded(tmp_path / "one"), loaded(tmp_path / "other")
    for seed, task in enumerate(tasks["first"]):
        tune(with_bank, task, Init.BANK, seed)
    ended = [
        (tune(with_bank, task, Init.BANK, seed), tune(without, task, Init.RANDOM, seed))
        for seed, task in enumerate(tasks["burst"], 100)
    ]
    assert all(json.loads(end.files["prompttuner.json"])["target_reached"] for pair in ended for end in pair)
    assert mean(banked.step for banked, _ in ended) < 0.75 * mean(random.step for _, random in ended)

"""Label accuracy is the share of rows whose own target is the likeliest of all labels, by stock computation too."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from broker.protocol.errors import DataError
from broker.protocol.messages import Assign, Ended
from broker.protocol.states import RequestState
from tuner import packing
from tuner.data import MOST_LABELS, Example, load_dataset
from tuner.labels import choices_of, chosen_right
from tuner.model import Base
from tuner.session import Session
from tuner.start import random_prompt

ROWS = b"".join(
    json.dumps({"input": f"{a} {b}", "target": target}).encode() + b"\n"
    for a in "abcdef"
    for b, target in (("g", "n"), ("h", "o o"), ("i", "p q r"))
)


def completed(session: Session, assign: Assign) -> Ended:
    session.join(assign)
    while True:
        for said in session.step():
            if isinstance(said, Ended):
                return said


def test_every_row_meets_every_label() -> None:
    rows = [Example((1, 2, 7), 1), Example((3, 8, 9), 2)]
    found = choices_of(rows, [(7,), (8, 9)])
    assert found == [Example((1, 2, 7), 1), Example((1, 2, 8, 9), 2), Example((3, 7), 1), Example((3, 8, 9), 2)]


def test_a_row_is_right_where_its_own_label_alone_has_the_lowest_total_loss() -> None:
    rows = [Example((1, 7), 1), Example((1, 8), 1), Example((1, 7), 1), Example((1, 7), 1)]
    losses = np.array([1.0, 2.0, 1.0, 2.0, 1.0, 1.0, np.nan, 1.0])
    assert chosen_right(rows, [(7,), (8,)], losses) == 1  # the others: wrong, a tie, no number


def test_labels_are_the_distinct_targets_of_training_and_evaluation(base: Base, make_request) -> None:
    assign = make_request(
        metric="label_accuracy",
        rows=b'{"input":"a","target":"b"}\n{"input":"c","target":"b"}\n',
        evaluation=b'{"input":"a","target":"c d"}\n',
    )
    labels = load_dataset(base, assign.spec, assign.train, assign.eval).labels
    assert labels == tuple(sorted((*base.tokenize([text])[0], *base.end_token) for text in ("b", "c d")))


def test_more_targets_than_labels_are_told(base: Base, make_request) -> None:
    def rows(count: int) -> bytes:
        pairs = ((chr(97 + i % 26), chr(97 + i // 26)) for i in range(count))
        return b"".join(json.dumps({"input": "a", "target": " ".join(pair)}).encode() + b"\n" for pair in pairs)

    assign = make_request(metric="label_accuracy")
    assert len(load_dataset(base, assign.spec, rows(MOST_LABELS), None).labels) == MOST_LABELS
    with pytest.raises(DataError, match="65 different targets, and at most 64 can be labels"):
        load_dataset(base, assign.spec, rows(MOST_LABELS + 1), None)


def test_the_longest_label_must_fit_behind_every_evaluated_input(base: Base, make_request) -> None:
    rows = b'{"input":"a","target":"' + b"b " * 40 + b'"}\n'
    evaluation = b'{"input":"' + b"c " * 40 + b'","target":"d"}\n'
    assign = make_request(metric="label_accuracy", rows=rows, evaluation=evaluation)
    with pytest.raises(DataError, match="longest label has 81 tokens, and 60 fit"):
        load_dataset(base, assign.spec, assign.train, assign.eval)
    assign = make_request(metric="accuracy", rows=rows, evaluation=evaluation)
    assert not load_dataset(base, assign.spec, assign.train, assign.eval).labels


def test_token_and_label_accuracy_are_what_row_by_row_computation_gives(bases: dict[str, Base], make_request) -> None:
    for base in bases.values():
        assign = make_request(metric="label_accuracy", rows=ROWS)
        data = load_dataset(base, assign.spec, assign.train, ROWS)
        prompt = random_prompt(base, 4, seed=3)

        def losses(tokens: tuple[int, ...], targets: int, base: Base = base, prompt: torch.Tensor = prompt):
            ids = torch.tensor(tokens)
            rows = torch.cat([prompt, base.embed(ids)])[None]
            logits = base.model(inputs_embeds=rows).logits[0, -targets - 1 : -1].detach()
            return functional.cross_entropy(logits, ids[-targets:], reduction="sum").item(), (
                (logits.argmax(1) == ids[-targets:]).sum().item()
            )

        right = sum(losses(row.tokens, row.targets)[1] for row in data.eval)
        (score,) = packing.score(base, [(prompt, data.eval)])
        assert score.token_accuracy == pytest.approx(right / sum(row.targets for row in data.eval))
        expected = 0
        for row in data.eval:
            given = row.tokens[: -row.targets]
            best = min(data.labels, key=lambda label: losses((*given, *label), len(label))[0])
            expected += best == row.tokens[-row.targets :]
        (judged,) = packing.judge(base, [(prompt, choices_of(data.eval, data.labels))])
        assert chosen_right(data.eval, data.labels, judged.loss) == expected


@pytest.mark.parametrize(("metric", "target"), [("token_accuracy", 0.3), ("label_accuracy", 0.6)])
def test_a_request_is_measured_and_ends_by_its_metric(
    make_session: Callable[..., Session], make_request: Callable[..., Assign], metric: str, target: float
) -> None:
    # Even a base without any training learns which label comes most.
    labels = ["n", "n", "n", "n", "o", "p"] * 3
    rows = [{"input": word, "target": label} for word, label in zip("abcdefghijklABCDEF", labels, strict=True)]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    fields = {"metric": metric, "target_score": target, "rows": data, "evaluation": data, "max_steps": 60}
    ended = completed(make_session(), make_request(**fields))
    assert ended.state is RequestState.COMPLETED
    report = json.loads(ended.files["prompttuner.json"])
    assert report["target_reached"] and ended.score == report["best"][metric] >= target
    assert all(0 <= point["token_accuracy"] <= 1 for point in report["curve"])
    assert all((point["label_accuracy"] is not None) is (metric == "label_accuracy") for point in report["curve"])

"""Rows become tokens, bad ones are named, and each step's rows follow from the seed alone."""

from __future__ import annotations

import msgspec
import pytest

from broker.protocol.errors import DataError
from tuner.data import BatchOrder, Example, Wording, load_dataset, read_examples, split
from tuner.model import Base, load_base


def test_a_row_is_input_then_target_then_the_end_token(base: Base) -> None:
    (example,) = read_examples(base, b'{"input":"a b","target":"c"}\n', 40, "training")
    assert example == Example((3, 4, 5, 2), targets=2)


def test_the_verbalizer_words_training_and_evaluation_rows_and_is_no_format(base: Base, make_request) -> None:
    rows = b'{"input":"a","target":"c"}\n'
    data = load_dataset(base, make_request(verbalizer="b {input} d").spec, rows, rows)
    assert data.train == data.eval == [Example((4, 3, 6, 5, 2), targets=2)]
    assert Wording("{0} {x} {{input}} {").words("{input} {y}") == "{0} {x} {{input} {y}} {"


@pytest.mark.parametrize("verbalizer", ["", "b", "{input}{input}", "{ input}", "{input}" + "x" * 4090, "{input}\0"])
def test_a_verbalizer_without_its_one_field_is_no_request(make_request, verbalizer: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        make_request(verbalizer=verbalizer)
    assert make_request(verbalizer="{x} {{input}}\n\t{input").spec.verbalizer == "{x} {{input}}\n\t{input"


def test_a_longer_input_keeps_its_end(base: Base, make_request) -> None:
    assign = make_request(verbalizer="b {input} d", max_input_tokens=3, rows=b'{"input":"a e f","target":"c"}\n')
    data = load_dataset(base, assign.spec, assign.train, None)
    assert data.train == [Example((7, 8, 6, 5, 2), targets=2)]
    many = b'{"input":"' + b"a " * 99 + b'","target":"b"}\n'
    assert len(load_dataset(base, assign.spec, many, None).train[0]) == 5


def test_a_longer_target_is_refused_by_its_row(base: Base, make_request) -> None:
    rows = b'{"input":"a","target":"c d"}\n{"input":"a","target":"c d e"}\n'
    assign = make_request(max_target_tokens=2, rows=rows)
    with pytest.raises(DataError, match="training row 2: the target has 3 tokens, more than the 2"):
        load_dataset(base, assign.spec, assign.train, None)
    assert len(load_dataset(base, make_request(max_target_tokens=3).spec, rows, None).train) == 1


def test_a_tokenizer_without_an_end_token_adds_none(model_dirs, tmp_path) -> None:
    import shutil

    directory = tmp_path / "no_end"
    shutil.copytree(model_dirs["llama"], directory)
    config = directory / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token": "<eos>",', ""))
    base, _ = load_base(str(directory))
    (example,) = read_examples(base, b'{"input":"a b","target":"c"}\n', 40, "training")
    assert example == Example((3, 4, 5), targets=1)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (b'{"input":"a","target":""}', "training row 2: the target has no tokens"),
        (b'{"input":"a","target":"  "}', "training row 2: the target has no tokens"),
        (b'{"input":"' + b"a " * 39 + b'","target":"b"}', "training row 2: 41 tokens, and 40 fit"),
        (b'{"input":"a"}', "training row 2: .*target"),
        (b"{", "training row 2: "),
        (b'{"input":"\xff","target":"a"}', "training row 2: "),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_its_number(base: Base, row: bytes, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_examples(base, b'{"input":"a","target":"b"}\n' + row + b"\n", 40, "training")


def test_the_longest_row_that_fits_is_taken(base: Base) -> None:
    row = b'{"input":"' + b"a " * 38 + b'","target":"b"}\n'
    assert len(read_examples(base, row, 40, "training")[0]) == 40


def test_no_rows_are_told(base: Base) -> None:
    with pytest.raises(DataError, match="no evaluation rows"):
        read_examples(base, b"", 40, "evaluation")


def test_rows_must_fit_beside_the_virtual_tokens(base: Base, make_request) -> None:
    assign = make_request(virtual_tokens=60, rows=b'{"input":"a b c","target":"d"}\n')
    with pytest.raises(DataError, match="5 tokens, and 4 fit"):
        load_dataset(base, assign.spec, assign.train, None)


@pytest.mark.parametrize(("rows", "kept"), [(2, 1), (10, 2), (1000, 64)])
def test_rows_set_aside_for_evaluation_are_never_trained_on(rows: int, kept: int) -> None:
    examples = [Example((i, i), 1) for i in range(rows)]
    data = split(examples, seed=7)
    assert len(data.eval) == kept
    assert sorted(e.tokens for e in data.train + data.eval) == sorted(e.tokens for e in examples)
    assert split(examples, seed=7) == data
    assert rows < 10 or split(examples, seed=8) != data


def test_a_single_row_is_trained_and_evaluated_on() -> None:
    data = split([Example((1, 2), 1)], seed=0)
    assert data.train == data.eval == [Example((1, 2), 1)]


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    order = BatchOrder(rows=10, batch_size=4, seed=3)
    taken = [row for step in range(5) for row in order.batch(step)]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]


def test_a_steps_rows_do_not_depend_on_the_steps_before() -> None:
    order = BatchOrder(rows=10, batch_size=4, seed=3)
    walked = [order.batch(step) for step in range(50)]
    assert [BatchOrder(10, 4, 3).batch(step) for step in reversed(range(50))] == walked[::-1]
    assert BatchOrder(10, 4, 4).batch(0) != walked[0]


def test_a_batch_is_never_larger_than_the_data() -> None:
    assert sorted(BatchOrder(rows=3, batch_size=8, seed=0).batch(5)) == [0, 1, 2]

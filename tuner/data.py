"""A request's rows: tokens, the split for evaluation, and which rows each step takes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from broker.protocol.errors import DataError
from broker.protocol.spec import INPUT_FIELD
from broker.protocol.states import Metric

if TYPE_CHECKING:
    from broker.protocol.spec import RequestSpec
    from tuner.model import Base

_EVAL_ROWS = 64  # split off when the request brings no evaluation rows
_EVAL_SHARE = 5  # one in so many
MOST_LABELS = 64  # each evaluation row runs once with every label


class Row(msgspec.Struct, frozen=True):
    """One line of the canonical JSON Lines."""

    input: str
    target: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row in tokens: the input, then the target and the tokenizer's end token if it has one."""

    tokens: tuple[int, ...]
    targets: int  # how many of the last tokens count in the loss

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Dataset:
    train: list[Example]
    eval: list[Example]
    labels: tuple[tuple[int, ...], ...] = ()  # the distinct targets, where the metric is to choose among them

    @property
    def longest(self) -> int:
        """The tokens of the longest row, an evaluation row with its longest label included."""
        label = max(map(len, self.labels), default=0)
        return max(*map(len, self.train), *(len(row) - row.targets + max(row.targets, label) for row in self.eval))


@dataclass(frozen=True, slots=True)
class Wording:
    """What becomes of a row's texts before they are tokens, and of its tokens before they are an example."""

    verbalizer: str = INPUT_FIELD
    max_input_tokens: int | None = None
    max_target_tokens: int | None = None

    @classmethod
    def of(cls, spec: RequestSpec) -> Wording:
        return cls(spec.verbalizer, spec.max_input_tokens, spec.max_target_tokens)

    def words(self, text: str) -> str:
        """The verbalizer with `text` in the place of its field. Nothing else in either has a meaning."""
        return self.verbalizer.replace(INPUT_FIELD, text)

    def cut(self, tokens: list[int]) -> list[int]:
        """The last tokens, as many as may be: what is next to the target stays."""
        return tokens if self.max_input_tokens is None else tokens[-self.max_input_tokens :]


def load_dataset(base: Base, spec: RequestSpec, train: bytes, evaluation: bytes | None) -> Dataset:
    """The examples of a request; without evaluation rows, a part of the training rows is set aside by the seed.

    Raises `DataError` with the number of the row that cannot be used."""
    room = base.positions - spec.virtual_tokens
    wording = Wording.of(spec)
    examples = read_examples(base, train, room, "training", wording)
    if evaluation is not None:
        data = Dataset(examples, read_examples(base, evaluation, room, "evaluation", wording))
    else:
        data = split(examples, spec.seed)
    return _with_labels(data, room) if spec.metric is Metric.LABEL_ACCURACY else data


def _with_labels(data: Dataset, room: int) -> Dataset:
    """Raises `DataError` for more targets than labels, and where the longest one does not fit behind some input."""
    labels = sorted({row.tokens[-row.targets :] for row in data.train + data.eval})
    if len(labels) > MOST_LABELS:
        raise DataError(
            f"label_accuracy: {len(labels)} different targets, and at most {MOST_LABELS} can be labels",
            "use --metric=accuracy or token_accuracy, or fewer labels",
        )
    found = replace(data, labels=tuple(labels))
    if found.longest > room:
        raise DataError(
            f"label_accuracy: an evaluation row with the longest label has {found.longest} tokens, and {room} fit "
            "beside the virtual tokens",
            "shorten the rows or use fewer virtual tokens",
        )
    return found


def read_examples(base: Base, rows: bytes, room: int, what: str, wording: Wording = Wording()) -> list[Example]:
    """The examples of canonical JSON Lines, worded so, each at most `room` tokens long.

    Raises `DataError` with the number of the row that cannot be used, and when there is no row."""
    decoded = _rows(rows, what)
    if not decoded:
        raise DataError(f"there are no {what} rows")
    end = base.end_token
    inputs = base.tokenize([wording.words(row.input) for row in decoded])
    targets = base.tokenize([row.target for row in decoded])
    examples = []
    for number, (given, wanted) in enumerate(zip(inputs, targets, strict=True), 1):
        if not wanted:
            raise DataError(f"{what} row {number}: the target has no tokens")
        if wording.max_target_tokens is not None and len(wanted) > wording.max_target_tokens:
            raise DataError(
                f"{what} row {number}: the target has {len(wanted)} tokens, more than the {wording.max_target_tokens} "
                "of --max-target-tokens",
                "shorten the target, or raise the limit",
            )
        given = wording.cut(given)
        if len(given) + len(wanted) + len(end) > room:
            length = len(given) + len(wanted) + len(end)
            raise DataError(
                f"{what} row {number}: {length} tokens, and {room} fit beside the virtual tokens",
                "shorten the row or use fewer virtual tokens",
            )
        examples.append(Example((*given, *wanted, *end), len(wanted) + len(end)))
    return examples


def split(examples: list[Example], seed: int) -> Dataset:
    """A fifth of the rows, at most 64, set aside for evaluation; a single row is trained and evaluated on."""
    if len(examples) == 1:
        return Dataset(examples, examples)
    count = max(1, min(_EVAL_ROWS, len(examples) // _EVAL_SHARE))
    order = np.random.default_rng([seed, 1]).permutation(len(examples)).tolist()
    kept = sorted(order[count:])
    return Dataset([examples[i] for i in kept], [examples[i] for i in sorted(order[:count])])


class BatchOrder:
    """Which rows each step takes: a pure function of (rows, batch size, seed, step), so that a resumed request sees
    exactly the rows it would have seen. Every row once an epoch, in an order of the epoch's own."""

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self._rows = rows
        self.batch_size = min(batch_size, rows)
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def batch(self, step: int) -> list[int]:
        """The row numbers of a step; steps count from 0."""
        first = step * self.batch_size
        return [self._row(position) for position in range(first, first + self.batch_size)]

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, self._rows)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, 0, epoch]).permutation(self._rows).tolist()
            self._epoch = epoch
        return self._order[place]


def spec_digest(spec: RequestSpec, base_digest: str) -> str:
    """What a checkpoint must match to be gone on from."""
    return hashlib.sha256(msgspec.msgpack.encode(spec) + base_digest.encode()).hexdigest()


def _rows(rows: bytes, what: str) -> list[Row]:
    decoder = msgspec.json.Decoder(Row)
    decoded = []
    for number, line in enumerate(rows.splitlines(), 1):
        try:
            decoded.append(decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataError(f"{what} row {number}: {error}") from None
    return decoded

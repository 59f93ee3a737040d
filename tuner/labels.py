"""Label accuracy: which of a request's labels a prompt takes for the likeliest, row by row.

The labels are the distinct targets of the training and evaluation rows. A label's likelihood is that of its tokens as a
whole, the end token included: the lowest total loss (not the mean) wins. A tie is no answer, so it counts as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tuner.data import Example

Label = tuple[int, ...]


def choices_of(rows: Sequence[Example], labels: Sequence[Label]) -> list[Example]:
    """Every row's input with every label behind it: all labels of the first row, then of the second, ..."""
    inputs = [row.tokens[: len(row) - row.targets] for row in rows]
    return [Example((*given, *label), len(label)) for given in inputs for label in labels]


def chosen_right(rows: Sequence[Example], labels: Sequence[Label], losses: NDArray[np.float64]) -> int:
    """In how many rows the row's own target has the lowest total loss; `losses` are those of `choices_of`."""
    number = {label: i for i, label in enumerate(labels)}
    own = np.array([number[row.tokens[len(row) - row.targets :]] for row in rows])
    table = losses.reshape(len(rows), len(labels)).copy()
    each = np.arange(len(rows))
    wanted = table[each, own]
    table[each, own] = np.inf
    return int((wanted < table.min(axis=1)).sum())

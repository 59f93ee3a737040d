"""Which rows share a forward pass: rows of similar length together, and no more tokens at once than fit into memory.

Pure arithmetic on lengths, the same on every machine, so that a request that moves to another worker walks the same
numbers there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MOST_BUCKETS = 4
_STEPS = 128  # distinct lengths that are told apart

Rows = NDArray[np.int64]


def batches(lengths: Rows, pass_tokens: float, max_tokens: int) -> list[Rows]:
    """The row numbers of each forward pass, together all rows. Where one more pass, at the price of `pass_tokens`,
    saves more padding than it costs, rows of similar length share one (at most `MOST_BUCKETS` kinds); a pass has at
    most `max_tokens` with its padding, or a single row."""
    found = []
    for bucket in _buckets(lengths, pass_tokens):
        most = max(1, max_tokens // max(1, int(lengths[bucket].max())))
        found += [bucket[first : first + most] for first in range(0, len(bucket), most)]
    return found


def padded_tokens(lengths: Rows, cut: list[Rows]) -> int:
    """What the passes compute, padding included."""
    return sum(len(rows) * int(lengths[rows].max()) for rows in cut)


def _buckets(lengths: Rows, pass_tokens: float) -> list[Rows]:
    longest = int(lengths.max())
    if longest * len(lengths) - int(lengths.sum()) <= pass_tokens:
        return [np.arange(len(lengths))]
    grain = -(-longest // _STEPS)
    widths, kind, counts = np.unique(-(-lengths // grain) * grain, return_inverse=True, return_counts=True)
    ends = _cuts(widths, counts, pass_tokens)
    return [np.flatnonzero((first <= kind) & (kind < end)) for first, end in zip([0, *ends[:-1]], ends, strict=True)]


def _cuts(widths: Rows, counts: Rows, pass_tokens: float) -> list[int]:
    """Where each bucket ends among the sorted `widths`, at the least cost of padded tokens and passes."""
    total = np.concatenate([[0], np.cumsum(counts)])
    kinds = len(widths)
    first, end = np.arange(kinds)[:, None], np.arange(1, kinds + 1)[None, :]
    alone = np.where(first < end, (total[end] - total[first]) * widths[end - 1] + pass_tokens, np.inf)
    best, chosen = alone[0], []
    ends = [kinds]
    cheapest = best[-1]
    for _ in range(1, min(MOST_BUCKETS, kinds)):
        through = best[:-1, None] + alone[1:]  # the bucket before ends at kind i, this one runs from there to `end`
        chosen.append(through.argmin(axis=0) + 1)
        best = through.min(axis=0)
        if best[-1] < cheapest:
            cheapest, ends = best[-1], [kinds]
            for choice in reversed(chosen):
                ends.insert(0, int(choice[ends[0] - 1]))
    return ends

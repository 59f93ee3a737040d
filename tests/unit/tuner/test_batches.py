"""Rows are sorted into passes at the least cost, and none is lost."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.batches import MOST_BUCKETS, batches, padded_tokens

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=9).map(np.array)


def least_cost(lengths: list[int], pass_tokens: int) -> int:
    """By trying all ways to cut the sorted lengths."""
    ordered, count = sorted(lengths), len(lengths)
    costs = []
    for cuts in range(min(MOST_BUCKETS, count)):
        for inner in combinations(range(1, count), cuts):
            ends = [0, *inner, count]
            spans = pairwise(ends)
            costs.append(sum((end - first) * ordered[end - 1] + pass_tokens for first, end in spans))
    return min(costs)


@settings(deadline=None, max_examples=150)
@given(LENGTHS, st.integers(0, 60))
def test_no_way_of_cutting_costs_less(lengths: np.ndarray, pass_tokens: int) -> None:
    cut = batches(lengths, pass_tokens, 1 << 40)
    assert sorted(np.concatenate(cut).tolist()) == list(range(len(lengths)))
    assert padded_tokens(lengths, cut) + pass_tokens * len(cut) == least_cost(lengths.tolist(), pass_tokens)


@settings(deadline=None, max_examples=100)
@given(LENGTHS, st.integers(0, 60), st.integers(1, 100))
def test_no_pass_is_larger_than_the_bound_unless_it_is_one_row(
    lengths: np.ndarray, pass_tokens: int, max_tokens: int
) -> None:
    cut = batches(lengths, pass_tokens, max_tokens)
    assert sorted(np.concatenate(cut).tolist()) == list(range(len(lengths)))
    assert all(len(rows) == 1 or padded_tokens(lengths, [rows]) <= max_tokens for rows in cut)


def test_thousands_of_lengths_are_cut_without_losing_a_row() -> None:
    lengths = np.random.default_rng(0).integers(1, 100_000, 5000)
    cut = batches(lengths, 0.0, 1 << 40)
    assert sorted(np.concatenate(cut).tolist()) == list(range(5000))
    assert len(cut) == MOST_BUCKETS
    assert padded_tokens(lengths, cut) < 1.3 * lengths.sum()

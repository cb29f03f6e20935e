"""Explanations: strips that add up, leave-one-out against scoring from scratch, flip sets against brute force, the command."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dmpo.use.align import align
from mlx_dmpo.use.flip import flip_set

# --- alignment


def test_stretches_that_changed_places_are_aligned():
    assert align([1, 2, 3, 9], [3, 1, 2, 9]) == [(0, 1), (1, 2), (2, 0), (3, 3)]
    assert align([1, 2], [3]) == [(0, None), (1, None), (None, 0)]
    assert align([5, 5], [5]) == [(0, 0), (1, None)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=9), st.lists(st.integers(0, 4), max_size=9))
def test_every_token_is_in_exactly_one_line(chosen, rejected):
    lines = align(chosen, rejected)
    assert sorted(i for i, _ in lines if i is not None) == list(range(len(chosen)))
    assert sorted(j for _, j in lines if j is not None) == list(range(len(rejected)))
    assert all(chosen[i] == rejected[j] for i, j in lines if i is not None and j is not None)


# --- flip sets


def margins_of(n, base, effects, pairs):
    """An arbitrary margin of what is left: base - sum of single effects - sum of what two items do together."""

    def margin(removed):
        return (
            base - sum(effects[i] for i in removed) - sum(pairs[i, j] for i, j in itertools.combinations(removed, 2))
        )

    return margin


def smallest(n, base, margin, limit):
    for size in range(1, min(limit, n - 1) + 1):
        if any(margin(s) * base < 0 for s in itertools.combinations(range(n), size)):
            return size
    return None


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 7), st.integers(0, 10**6), st.sampled_from([0, 1, 2, 3]), st.sampled_from([1, -1]))
def test_the_flip_set_is_the_smallest_and_flips(n, seed, limit, sign):
    rng = np.random.default_rng(seed)
    base = float(sign * rng.uniform(0.5, 4))
    margin = margins_of(n, base, rng.normal(size=n), rng.normal(size=(n, n)))
    found, alone = flip_set(n, base, lambda sets: np.array([margin(s) for s in sets]), limit)
    if n > 1:
        assert alone == pytest.approx([margin((i,)) for i in range(n)])
    size = smallest(n, base, margin, limit)
    assert (found and len(found)) == size
    if found:
        assert margin(found) * base < 0


def test_a_set_of_two_that_greed_misses():
    """Alone, item 0 moves most, but only 1 and 2 together flip."""
    together = np.zeros((4, 4))
    together[1, 2] = 5
    margin = margins_of(4, 2.0, [0.5, 0.1, 0.1, 0.0], together)
    found, _ = flip_set(4, 2.0, lambda sets: np.array([margin(s) for s in sets]))
    assert found == (1, 2)


def test_no_set_is_scored_twice_and_an_early_answer_ends_the_search():
    seen = []

    def margins(sets):
        seen.extend(sets)
        return np.array([3.0 - 2 * len(s) for s in sets])

    found, _ = flip_set(10, 3.0, margins)
    assert len(found) == 2 and len(seen) == len(set(seen)) == 10 + 9  # every single item, then the greedy pairs


def test_a_tie_and_a_history_of_one_have_no_flip():
    assert flip_set(3, 0.0, lambda sets: np.ones(len(sets)))[0] is None
    assert flip_set(1, 1.0, lambda sets: -np.ones(len(sets)))[0] is None

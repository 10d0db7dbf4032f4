"""Intervals of differences, against resampling query by query and against theory."""

import numpy as np
import pytest

from cn_clip.errors import UsageError
from cn_clip.eval.metrics.bootstrap import paired_interval


def test_the_interval_is_that_of_drawing_queries_one_by_one():
    rng = np.random.default_rng(3)
    ours, theirs = rng.integers(0, 4, 80) / 3, rng.integers(0, 4, 80) / 3
    drawn = rng.integers(0, 80, (20_000, 80))
    oracle = np.quantile((ours - theirs)[drawn].mean(axis=1), [0.025, 0.975])
    found = paired_interval(ours, theirs, samples=20_000)
    assert found.value == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert np.allclose([found.low, found.high], oracle, atol=0.01)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        ours = rng.random(200) < 0.6
        theirs = np.where(rng.random(200) < 0.5, ours, rng.random(200) < 0.5)  # they go together
        found = paired_interval(ours, theirs, samples=1_000, seed=seed)
        held += found.low <= 0.6 - (0.5 * 0.6 + 0.5 * 0.5) <= found.high
    assert 0.90 <= held / 300 <= 0.99


def test_the_same_seed_gives_the_same_interval_and_another_nearly_so():
    ours, theirs = np.random.default_rng(2).random((2, 50))
    first = paired_interval(ours, theirs)
    assert paired_interval(ours, theirs) == first
    other = paired_interval(ours, theirs, seed=1)
    assert other != first
    assert other.low == pytest.approx(first.low, abs=0.02)


def test_equal_answers_differ_by_nothing_for_sure():
    found = paired_interval(np.ones(7), np.ones(7))
    assert (found.value, found.low, found.high, found.sure) == (0, 0, 0, False)
    assert paired_interval(np.ones(7), np.zeros(7)).sure


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([1.0], [1.0, 0.0], "not pairs"),
        ([], [], "at least one query"),
        ([float("nan")], [1.0], "NaN"),
    ],
)
def test_what_is_no_pair_of_answers_is_refused(ours, theirs, said):
    with pytest.raises(UsageError, match=said):
        paired_interval(np.array(ours), np.array(theirs))

"""Bootstrap intervals against resampling query by query, and against theory."""

import numpy as np
import pytest

from cn_clip.errors import UsageError
from cn_clip.eval.metrics.bootstrap import paired_interval


def test_the_interval_equals_resampling_queries_one_by_one():
    rng = np.random.default_rng(3)
    ours, theirs = rng.integers(0, 4, 80) / 3, rng.integers(0, 4, 80) / 3
    drawn = rng.integers(0, 80, (20_000, 80))
    oracle = np.quantile((ours - theirs)[drawn].mean(axis=1), [0.025, 0.975])
    found = paired_interval(ours, theirs, samples=20_000)
    assert found.value == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert np.allclose([found.low, found.high], oracle, atol=0.01)


def test_the_interval_has_its_nominal_coverage():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        ours = rng.random(200) < 0.6
        theirs = np.where(rng.random(200) < 0.5, ours, rng.random(200) < 0.5)  # correlated
        found = paired_interval(ours, theirs, samples=1_000, seed=seed)
        covered += found.low <= 0.6 - (0.5 * 0.6 + 0.5 * 0.5) <= found.high
    assert 0.90 <= covered / 300 <= 0.99


def test_the_interval_is_deterministic_and_stable_across_seeds():
    ours, theirs = np.random.default_rng(2).random((2, 50))
    first = paired_interval(ours, theirs)
    assert paired_interval(ours, theirs) == first
    other = paired_interval(ours, theirs, seed=1)
    assert other != first
    assert other.low == pytest.approx(first.low, abs=0.02)


def test_equal_values_have_no_significant_difference():
    found = paired_interval(np.ones(7), np.ones(7))
    assert (found.value, found.low, found.high, found.excludes_zero) == (0, 0, 0, False)
    assert paired_interval(np.ones(7), np.zeros(7)).excludes_zero


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([1.0], [1.0, 0.0], "not paired"),
        ([], [], "at least one query"),
        ([float("nan")], [1.0], "NaN"),
    ],
)
def test_unpaired_and_nonfinite_values_are_refused(ours, theirs, said):
    with pytest.raises(UsageError, match=said):
        paired_interval(np.array(ours), np.array(theirs))

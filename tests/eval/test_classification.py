"""Classification metrics against their definitions, written as loops."""

import numpy as np
import pytest

from cn_clip.errors import UsageError
from cn_clip.eval.metrics.classification import (
    confusions,
    map_11_points,
    mean_per_class,
    ranks_of_truth,
    roc_auc,
)


def drawn(seed, rows=60, classes=5):
    """Scores with many ties, and true classes that include every class."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, (rows, classes)) / 5
    return scores, rng.permutation(np.arange(rows) % classes), rng


@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_positions_in_a_stable_sort(seed):
    scores, truth, _ = drawn(seed)
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = [row.tolist().index(true) for row, true in zip(order, truth, strict=True)]
    assert ranks_of_truth(scores, truth).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_mean_per_class_is_the_mean_of_recalls(seed):
    scores, truth, _ = drawn(seed)
    truth = truth % 4  # one class has no image
    best = scores.argmax(1)
    expected = np.mean([np.mean(best[truth == c] == c) for c in range(4)])
    assert mean_per_class(scores, truth) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_map_is_the_highest_precision_at_eleven_recalls(seed):
    scores, _, rng = drawn(seed)
    relevant = rng.random(scores.shape) < 0.3
    relevant[0] = True
    expected = []
    for column in range(scores.shape[1]):
        s, y = scores[:, column], relevant[:, column]
        curve = [(0.0, 1.0)]  # as scikit-learn's curve begins, and with it ELEVATER's
        curve += [((y & (s >= t)).sum() / y.sum(), y[s >= t].mean()) for t in np.unique(s)]
        expected.append(
            np.mean([max(p for r, p in curve if r >= at) for at in np.linspace(1, 0, 11)])
        )
    assert map_11_points(scores, relevant) == pytest.approx(np.mean(expected))


def test_map_of_a_perfect_and_of_the_worst_ranking():
    relevant = np.arange(20)[:, None] < 10
    assert map_11_points(-np.arange(20.0)[:, None], relevant) == 1
    assert map_11_points(np.arange(20.0)[:, None], relevant) < 0.6


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_fraction_of_pairs_in_order(seed):
    scores, _, rng = drawn(seed)
    scores, positive = scores[:, 0], rng.random(len(scores)) < 0.4
    a, b = scores[positive][:, None], scores[~positive][None]
    assert roc_auc(scores, positive) == pytest.approx(np.mean((a > b) + (a == b) / 2))


def test_confusions_come_most_frequent_first():
    scores = np.eye(3)[[0, 1, 1, 2, 1, 1]]
    found = confusions(scores, np.array([0, 0, 0, 0, 1, 2]), ["猫", "狗", "鸟"])
    assert [(c.truth, c.predicted, c.count) for c in found] == [
        ("猫", "狗", 2),
        ("猫", "鸟", 1),
        ("鸟", "狗", 1),
    ]


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (ranks_of_truth, ([[0.1, np.nan]], [0]), "NaN"),
        (ranks_of_truth, ([[0.1, 0.2]], [2]), "row 0 has class 2"),
        (ranks_of_truth, ([[0.1, 0.2]], [0, 1]), "one integer class per row"),
        (ranks_of_truth, (np.empty((0, 2)), np.empty(0, int)), "no scores to measure"),
        (map_11_points, ([[0.1, 0.2]], [[True, False]]), "class 1 has no image"),
        (map_11_points, ([[0.1, 0.2]], [[True]]), "shape"),
        (roc_auc, ([0.1, 0.2], np.array([True, True])), "no ROC curve"),
    ],
)
def test_invalid_input_is_refused(function, arguments, message):
    with pytest.raises(UsageError, match=message):
        function(*arguments)

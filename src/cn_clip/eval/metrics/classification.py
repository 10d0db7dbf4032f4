"""Scores of a classification, from probabilities or cosines and the truth; numpy alone.

The four that ELEVATER uses (Li et al., 2022, arXiv:2204.08790) are computed as its toolkit does:
accuracy, mean per class, 11-point mAP and ROC AUC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import UsageError
from cn_clip.topk import checked

Scores = npt.NDArray[Any]
Classes = npt.NDArray[np.int64]
Relevant = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Confusion:
    """``count`` pictures of the class ``truth`` were taken for ``predicted``; both are labels."""

    truth: str
    predicted: str
    count: int


def ranks_of_truth(scores: Scores, truth: Classes) -> Classes:
    """Return how many classes score above the true one, (N,); of equals, lower columns come first.

    Args:
        scores: (N, M).
        truth: the true column of each row, (N,).

    Raises:
        UsageError: a score is not finite, or a class is not among the M.
    """
    scores = checked(scores, "scores")
    truth = _checked_truth(truth, scores)
    own = scores[np.arange(len(truth)), truth][:, None]
    ahead = scores > own
    ahead |= (scores == own) & (np.arange(scores.shape[1]) < truth[:, None])
    ranks: Classes = np.count_nonzero(ahead, axis=1)
    return ranks


def mean_per_class(scores: Scores, truth: Classes) -> float:
    """Return the mean over classes of the share of their pictures whose best class is right.

    Classes without a picture do not count, as in a balanced accuracy.
    """
    right = ranks_of_truth(scores, truth) == 0
    count = np.bincount(truth, minlength=scores.shape[1])
    there = count > 0
    return float((np.bincount(truth, right, scores.shape[1])[there] / count[there]).mean())


def map_11_points(scores: Scores, relevant: Relevant) -> float:
    """Return the mean over classes of the 11-point interpolated average precision.

    At recall 0, 0.1, ... 1 it takes the best precision at that recall or above (Everingham et al.,
    2010, section 4.2); at recall 0 it is 1, as in ELEVATER's toolkit, which counts the point
    before the first answer. Equal scores are answered together.

    Args:
        scores: (N, M).
        relevant: which classes each picture shows, (N, M).

    Raises:
        UsageError: a score is not finite, shapes differ, or a class has no picture.
    """
    scores, relevant = checked(scores, "scores"), np.asarray(relevant, bool)
    if scores.shape != relevant.shape:
        raise UsageError(f"scores of shape {scores.shape} with labels of shape {relevant.shape}")
    count = relevant.sum(axis=0)
    if not count.all():
        raise UsageError(f"class {np.flatnonzero(count == 0)[0]} has no picture, so no precision")
    points = np.linspace(1, 0, 11)
    precisions = []
    for column in range(scores.shape[1]):  # classes, not queries
        order = np.argsort(-scores[:, column], kind="stable")
        ranked = scores[order, column]
        last = np.append(ranked[1:] < ranked[:-1], True)  # of those with an equal score
        hits = np.cumsum(relevant[order, column])[last]
        precision = np.append(1.0, hits / (np.flatnonzero(last) + 1))
        recall = np.append(0.0, hits / count[column])
        best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or above
        precisions.append(best[np.searchsorted(recall, points)].mean())
    return float(np.mean(precisions))


def roc_auc(scores: Scores, positive: Relevant) -> float:
    """Return the chance that a positive scores above a negative, a tie counting half.

    Args:
        scores: (N,).
        positive: (N,).

    Raises:
        UsageError: a score is not finite, or all are positive or none is.
    """
    scores, positive = checked(np.asarray(scores)[:, None], "scores")[:, 0], np.asarray(positive)
    some, others = int(positive.sum()), int((~positive).sum())
    if not some or not others:
        raise UsageError(f"{some} positives and {others} negatives have no ROC curve; give both")
    _, group, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[group]  # the mean rank of equals, from 1
    return float((rank[positive].sum() - some * (some + 1) / 2) / (some * others))


def confusions(
    scores: Scores, truth: Classes, labels: Sequence[str], count: int = 10
) -> list[Confusion]:
    """Return the most frequent mistakes, most first."""
    best, classes = scores.argmax(axis=1), len(labels)
    wrong = best != truth
    pairs, number = np.unique(truth[wrong] * classes + best[wrong], return_counts=True)
    return [
        Confusion(labels[pairs[at] // classes], labels[pairs[at] % classes], int(number[at]))
        for at in np.argsort(-number, kind="stable")[:count]
    ]


def _checked_truth(truth: Classes, scores: Scores) -> Classes:
    truth = np.asarray(truth)
    if truth.shape != (len(scores),) or not np.issubdtype(truth.dtype, np.integer):
        raise UsageError(
            f"a truth of shape {truth.shape} and type {truth.dtype} for {len(scores)} rows of "
            "scores; give one class a row"
        )
    if not len(truth):
        raise UsageError("no rows of scores, so there is nothing to measure; give some pictures")
    outside = np.flatnonzero((truth < 0) | (truth >= scores.shape[1]))
    if len(outside):
        raise UsageError(
            f"row {outside[0]} is of class {truth[outside[0]]}, but there are scores for "
            f"{scores.shape[1]} classes; count from 0"
        )
    return truth

"""Classification metrics; numpy only.

Accuracy, mean per class, 11-point mAP and ROC AUC are computed as in the toolkit of ELEVATER (Li et
al., 2022, arXiv:2204.08790).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import UsageError
from cn_clip.topk import checked_vectors
from cn_clip.translation import _

Scores = npt.NDArray[Any]
Classes = npt.NDArray[np.int64]
Relevant = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Confusion:
    """``count`` images with the label ``truth`` were classified as ``predicted``."""

    truth: str
    predicted: str
    count: int


def ranks_of_truth(scores: Scores, truth: Classes) -> Classes:
    """Return the rank (N,) of the true class, 0 for the top; ties rank by column, lowest first.

    Args:
        scores: (N, M).
        truth: true column of each row, (N,).

    Raises:
        UsageError: a score is not finite, or a class is out of range.
    """
    scores = checked_vectors(scores, "scores")
    truth = _checked_truth(truth, scores)
    true_scores = scores[np.arange(len(truth)), truth][:, None]
    ahead = scores > true_scores
    ahead |= (scores == true_scores) & (np.arange(scores.shape[1]) < truth[:, None])
    ranks: Classes = np.count_nonzero(ahead, axis=1)
    return ranks


def mean_per_class(scores: Scores, truth: Classes) -> float:
    """Return the mean accuracy per class (balanced accuracy), over classes with an image."""
    correct = ranks_of_truth(scores, truth) == 0
    count = np.bincount(truth, minlength=scores.shape[1])
    present = count > 0
    return float((np.bincount(truth, correct, scores.shape[1])[present] / count[present]).mean())


def map_11_points(scores: Scores, relevant: Relevant) -> float:
    """Return the mean over classes of the 11-point interpolated average precision.

    It averages the highest precision at recall 0, 0.1, ... 1 or above (Everingham et al., 2010,
    section 4.2). Precision at recall 0 is 1, as in ELEVATER's toolkit. Equal scores share one
    threshold.

    Args:
        scores: (N, M).
        relevant: whether an image shows a class, (N, M).

    Raises:
        UsageError: a score is not finite, shapes differ, or a class has no image.
    """
    scores, relevant = checked_vectors(scores, "scores"), np.asarray(relevant, bool)
    if scores.shape != relevant.shape:
        raise UsageError(
            _(
                "scores of shape {shape} with labels of shape {relevant_shape}",
                shape=scores.shape,
                relevant_shape=relevant.shape,
            )
        )
    count = relevant.sum(axis=0)
    if not count.all():
        raise UsageError(
            _("class {number} has no image; remove it", number=np.flatnonzero(count == 0)[0])
        )
    points = np.linspace(1, 0, 11)
    precisions = []
    for column in range(scores.shape[1]):
        order = np.argsort(-scores[:, column], kind="stable")
        ranked = scores[order, column]
        last = np.append(ranked[1:] < ranked[:-1], True)  # of each run of equal scores
        hits = np.cumsum(relevant[order, column])[last]
        precision = np.append(1.0, hits / (np.flatnonzero(last) + 1))
        recall = np.append(0.0, hits / count[column])
        best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or above
        precisions.append(best[np.searchsorted(recall, points)].mean())
    return float(np.mean(precisions))


def roc_auc(scores: Scores, positive: Relevant) -> float:
    """Return the probability that a positive scores above a negative; ties count half.

    Args:
        scores: (N,).
        positive: (N,).

    Raises:
        UsageError: a score is not finite, or there are no positives or no negatives.
    """
    scores, positive = (
        checked_vectors(np.asarray(scores)[:, None], "scores")[:, 0],
        np.asarray(positive),
    )
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        raise UsageError(
            _(
                "{positives} positives and {negatives} negatives have no ROC curve; give both",
                positives=positives,
                negatives=negatives,
            )
        )
    _unused, group, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[group]  # mean rank of ties, from 1
    wins = rank[positive].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * negatives))


def confusions(
    scores: Scores, truth: Classes, labels: Sequence[str], count: int = 10
) -> list[Confusion]:
    """Return the most frequent confusions, most frequent first."""
    best, classes = scores.argmax(axis=1), len(labels)
    wrong = best != truth
    pairs, counts = np.unique(truth[wrong] * classes + best[wrong], return_counts=True)
    return [
        Confusion(labels[pairs[n] // classes], labels[pairs[n] % classes], int(counts[n]))
        for n in np.argsort(-counts, kind="stable")[:count]
    ]


def _checked_truth(truth: Classes, scores: Scores) -> Classes:
    truth = np.asarray(truth)
    if truth.shape != (len(scores),) or not np.issubdtype(truth.dtype, np.integer):
        raise UsageError(
            _(
                "true classes of shape {shape} and type {dtype} for {score_count} rows of scores; "
                "give one integer class per row",
                shape=truth.shape,
                dtype=truth.dtype,
                score_count=len(scores),
            )
        )
    if not len(truth):
        raise UsageError(_("no scores to measure; give at least one image"))
    outside = np.flatnonzero((truth < 0) | (truth >= scores.shape[1]))
    if len(outside):
        raise UsageError(
            _(
                "row {row} has class {number}, but there are scores for only {score_width} "
                "classes; classes count from 0",
                row=outside[0],
                number=truth[outside[0]],
                score_width=scores.shape[1],
            )
        )
    return truth

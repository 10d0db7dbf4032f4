"""When the best of a list is no answer: a threshold on its cosine, at a chosen precision.

Every question is asked twice, with its answer in the list and without: half of the questions have
no answer, and whatever is found for those is wrong. The longer the list, the higher the best of
what does not match, so there are two thresholds: for a search of the whole gallery, and for a list
of ten labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cn_clip.eval.metrics.recall import Pairs
from cn_clip.topk import Vectors

LABELS = 10  # in the lists that the threshold for labels is fitted on
_LEAST_ANSWERS = 10  # above a threshold
_BLOCK = 1 << 24  # scores at a time

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Answers:
    """The best answer of every query, once with its own in the gallery, once without.

    ``cosines`` (A,), whether the answer is ``right`` (A,), whether its own was ``there`` (A,).
    """

    cosines: Floats
    right: Flags
    there: Flags


@dataclass(frozen=True, slots=True)
class Answered:
    """What a threshold does: the share of answers given that are right (None if it gives none), the
    share of queries answered whose own is there, and of those told "nothing" whose own is not."""

    threshold: float | None
    precision: float | None
    answered: float
    refused: float


def all_answers(images: Vectors, texts: Vectors, pairs: Pairs, *, seed: int) -> dict[str, Answers]:
    """Ask for ``search`` every text among all images, for ``labels`` every image among ten texts.

    Args:
        images: unit vectors (N, D).
        texts: unit vectors (M, D).
        pairs: rows (P, 2), an image's and a text's, of all that belong together.
        seed: of the texts that are drawn.
    """
    return {
        "search": best_answers(texts, images, pairs[:, ::-1]),
        "labels": label_answers(images, texts, pairs, seed=seed),
    }


def best_answers(
    queries: Vectors, gallery: Vectors, positives: Pairs, *, block: int = _BLOCK
) -> Answers:
    """Find the best answer of every query that has a positive, with and without its positives.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        positives: rows (P, 2), a query's and a gallery's.
        block: scores held in memory at a time.
    """
    asking, row = np.unique(positives[:, 0], return_inverse=True)
    order = np.argsort(row, kind="stable")
    row, column = row[order], positives[order, 1]
    step = max(1, block // max(1, len(gallery)))
    best, right, second = np.empty(len(asking)), np.empty(len(asking), bool), np.empty(len(asking))
    for at in range(0, len(asking), step):
        scores = queries[asking[at : at + step]] @ gallery.T  # (B, G)
        here, lines = slice(at, at + len(scores)), np.arange(len(scores))
        first, last = np.searchsorted(row, [at, here.stop])
        top = scores.argmax(axis=1)
        best[here] = scores[lines, top]
        scores[row[first:last] - at, column[first:last]] = -np.inf
        right[here] = np.isneginf(scores[lines, top])
        second[here] = scores.max(axis=1)
    some = np.isfinite(second)  # a query that the whole gallery answers is never without
    return Answers(
        np.concatenate([best, second[some]]),
        np.concatenate([right, np.zeros(some.sum(), bool)]),
        np.arange(len(best) + some.sum()) < len(best),
    )


def label_answers(
    images: Vectors, texts: Vectors, pairs: Pairs, *, seed: int, labels: int = LABELS
) -> Answers:
    """Ask for every pair which of some texts fits the image best: its own beside others drawn at
    random, then one more of those in its place."""
    rng = np.random.default_rng(seed)
    others = rng.integers(0, len(texts), (len(pairs), labels))
    own = np.sort(pairs[:, 0] * len(texts) + pairs[:, 1])
    true = np.isin(pairs[:, :1] * len(texts) + others, own)
    mine, drawn = np.empty(len(pairs)), np.empty(others.shape)
    for at in range(0, len(pairs), 1 << 10):
        here = slice(at, at + (1 << 10))
        image = images[pairs[here, 0]]
        mine[here] = np.einsum("bd,bd->b", image, texts[pairs[here, 1]])
        drawn[here] = np.einsum("bd,bld->bl", image, texts[others[here]])
    drawn[true] = -np.inf  # a text that fits the image is no wrong answer
    beside, without = drawn[:, 1:].max(axis=1), drawn.max(axis=1)
    some = np.isfinite(without)
    return Answers(
        np.concatenate([np.maximum(mine, beside), without[some]]),
        np.concatenate([mine >= beside, np.zeros(some.sum(), bool)]),
        np.arange(len(pairs) + some.sum()) < len(pairs),
    )


def threshold_for(answers: Answers, precision: float) -> float | None:
    """Return the lowest cosine that at least ``precision`` of the answers from it up are right for,
    ten answers or more; None if there is none."""
    order = np.argsort(-answers.cosines, kind="stable")
    cosines = answers.cosines[order]
    given = np.arange(1, len(order) + 1)
    good = np.cumsum(answers.right[order]) >= precision * given
    good &= given >= _LEAST_ANSWERS
    good[:-1] &= cosines[1:] < cosines[:-1]  # equal cosines are answered together
    return float(cosines[np.flatnonzero(good)[-1]]) if good.any() else None


def answered(answers: Answers, threshold: float | None) -> Answered:
    """Tell what a threshold does to these answers."""
    given = answers.cosines >= (np.inf if threshold is None else threshold)
    without = ~answers.there
    return Answered(
        threshold,
        float(answers.right[given].mean()) if given.any() else None,
        float(given[answers.there].mean()),
        float(1 - given[without].mean()) if without.any() else 1.0,
    )

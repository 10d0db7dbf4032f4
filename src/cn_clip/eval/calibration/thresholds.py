"""Cosine thresholds below which the top result is rejected as "no match".

Every query is run twice, with its positives in the gallery and without: half of the queries have no
match, and any result for those is wrong. The top cosine of non-matching results rises with the
gallery's size, so two thresholds are fitted: for a search of the whole gallery, and for a list of
ten labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cn_clip.eval.metrics.recall import Pairs
from cn_clip.topk import Vectors

LABELS = 10  # length of the lists that the threshold for labels is fitted on
_MIN_ACCEPTED = 10  # results at or above a threshold
_BLOCK = 1 << 24  # scores in memory at a time

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TopMatches:
    """Top result of every query, once with its positives in the gallery and once without.

    ``cosines`` (R,); ``correct`` (R,), of the results; ``has_match`` (R,), of the galleries.
    """

    cosines: Floats
    correct: Flags
    has_match: Flags


@dataclass(frozen=True, slots=True)
class ThresholdEffect:
    """Precision of accepted results; acceptance rate if a match exists; rejection rate if none.

    ``precision`` is None if nothing is accepted; a ``threshold`` of None rejects everything.
    """

    threshold: float | None
    precision: float | None
    acceptance: float
    rejection: float


def top_matches(
    images: Vectors, texts: Vectors, pairs: Pairs, *, seed: int
) -> dict[str, TopMatches]:
    """Return the top results of ``search`` (each text against all images) and of ``labels`` (each
    image against ten texts).

    Args:
        images: unit vectors (N, D).
        texts: unit vectors (M, D).
        pairs: (P, 2) rows of an image and a text, all that match.
        seed: of the texts drawn as labels.
    """
    return {
        "search": search_matches(texts, images, pairs[:, ::-1]),
        "labels": label_matches(images, texts, pairs, seed=seed),
    }


def search_matches(
    queries: Vectors, gallery: Vectors, positives: Pairs, *, block: int = _BLOCK
) -> TopMatches:
    """Return the top result of every query that has a positive, with and without its positives.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        positives: (P, 2) rows of a query and a gallery item.
        block: scores in memory at a time.
    """
    with_positive, row = np.unique(positives[:, 0], return_inverse=True)
    order = np.argsort(row, kind="stable")
    row, column = row[order], positives[order, 1]
    step = max(1, block // max(1, len(gallery)))
    count = len(with_positive)
    best, correct, second = np.empty(count), np.empty(count, bool), np.empty(count)
    for start in range(0, count, step):
        scores = queries[with_positive[start : start + step]] @ gallery.T  # (B, G)
        batch, lines = slice(start, start + len(scores)), np.arange(len(scores))
        first, last = np.searchsorted(row, [start, batch.stop])
        top = scores.argmax(axis=1)
        best[batch] = scores[lines, top]
        scores[row[first:last] - start, column[first:last]] = -np.inf
        correct[batch] = np.isneginf(scores[lines, top])
        second[batch] = scores.max(axis=1)
    finite = np.isfinite(second)  # not if the whole gallery is positive
    return TopMatches(
        np.concatenate([best, second[finite]]),
        np.concatenate([correct, np.zeros(finite.sum(), bool)]),
        np.arange(count + finite.sum()) < count,
    )


def label_matches(
    images: Vectors, texts: Vectors, pairs: Pairs, *, seed: int, labels: int = LABELS
) -> TopMatches:
    """Return the top label of every pair's image: among its text and random other texts, then
    with one more random text in place of its own."""
    rng = np.random.default_rng(seed)
    others = rng.integers(0, len(texts), (len(pairs), labels))
    positive = np.sort(pairs[:, 0] * len(texts) + pairs[:, 1])
    matching = np.isin(pairs[:, :1] * len(texts) + others, positive)
    own, drawn = np.empty(len(pairs)), np.empty(others.shape)
    for start in range(0, len(pairs), 1 << 10):
        batch = slice(start, start + (1 << 10))
        image = images[pairs[batch, 0]]
        own[batch] = np.einsum("bd,bd->b", image, texts[pairs[batch, 1]])
        drawn[batch] = np.einsum("bd,bld->bl", image, texts[others[batch]])
    drawn[matching] = -np.inf  # a drawn text that matches the image is not a wrong result
    distractor, without = drawn[:, 1:].max(axis=1), drawn.max(axis=1)
    finite = np.isfinite(without)
    return TopMatches(
        np.concatenate([np.maximum(own, distractor), without[finite]]),
        np.concatenate([own >= distractor, np.zeros(finite.sum(), bool)]),
        np.arange(len(pairs) + finite.sum()) < len(pairs),
    )


def fit_threshold(matches: TopMatches, precision: float) -> float | None:
    """Return the lowest cosine at or above which at least ten results lie and at least
    ``precision`` of them are correct; None if there is none."""
    order = np.argsort(-matches.cosines, kind="stable")
    cosines = matches.cosines[order]
    accepted = np.arange(1, len(order) + 1)
    reached = np.cumsum(matches.correct[order]) >= precision * accepted
    reached &= accepted >= _MIN_ACCEPTED
    reached[:-1] &= cosines[1:] < cosines[:-1]  # equal cosines are accepted together
    return float(cosines[np.flatnonzero(reached)[-1]]) if reached.any() else None


def threshold_effect(matches: TopMatches, threshold: float | None) -> ThresholdEffect:
    """Measure a threshold on these results."""
    accepted = matches.cosines >= (np.inf if threshold is None else threshold)
    without = ~matches.has_match
    return ThresholdEffect(
        threshold,
        float(matches.correct[accepted].mean()) if accepted.any() else None,
        float(accepted[matches.has_match].mean()),
        float(1 - accepted[without].mean()) if without.any() else 1.0,
    )

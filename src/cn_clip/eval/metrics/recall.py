"""Exact retrieval recall in both directions, from embeddings; numpy only.

Recall at k is the fraction of queries with a positive among their top k results (Hodosh, Young and
Hockenmaier, "Framing Image Description as a Ranking Task", 2013). Its mean over k is the mean
recall of Chinese-CLIP (Yang et al., 2022, arXiv:2211.01335, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import UsageError
from cn_clip.topk import Vectors, checked_vectors
from cn_clip.translation import _

Pairs = npt.NDArray[Any]
Ranks = npt.NDArray[np.int64]

_BLOCK = 1 << 24  # scores in memory at a time, 64 MiB of float32


@dataclass(frozen=True, slots=True)
class Recall:
    """Recall at 1, 5 and 10, fractions in [0, 1]."""

    r1: float
    r5: float
    r10: float

    @property
    def mean(self) -> float:
        return (self.r1 + self.r5 + self.r10) / 3


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Recall in both directions."""

    text_to_image: Recall
    image_to_text: Recall

    @property
    def mean_recall(self) -> float:
        """The mean of the six recalls."""
        return (self.text_to_image.mean + self.image_to_text.mean) / 2


def retrieval(images: Vectors, texts: Vectors, pairs: Pairs, *, block: int = _BLOCK) -> Retrieval:
    """Measure recall from texts to images and from images to texts.

    Args:
        images: embeddings (N, D).
        texts: embeddings (M, D), each text once: duplicates compete with each other.
        pairs: (P, 2) rows of an image and a text, all that match, in any order. If a query has
            several positives, one of them counts. Unpaired items are gallery distractors, never
            queries.
        block: scores in memory at a time.

    Raises:
        UsageError: an embedding is not finite, shapes do not match, or there are no pairs.
    """
    images, texts = checked_vectors(images, "images"), checked_vectors(texts, "texts")
    pairs = _checked_pairs(pairs, len(images), len(texts), ("image", "text"))
    return Retrieval(
        text_to_image=_recall(texts, images, pairs[:, ::-1], block),
        image_to_text=_recall(images, texts, pairs, block),
    )


def ranks_of_best(
    queries: Vectors, gallery: Vectors, positives: Pairs, *, block: int = _BLOCK
) -> Ranks:
    """Return the rank (Q,) of each query's best positive, 0 for the top.

    The gallery is ranked by dot product, highest first; ties rank by row, lowest first, as in a
    stable sort. Ranks are counted, not sorted, and no (Q, G) array is allocated.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        positives: (P, 2) rows of a query and a gallery item, in any order; each query needs one.
        block: scores in memory at a time; at least the G scores of one query.

    Raises:
        UsageError: an embedding is not finite, shapes do not match, or a query has no positive.
    """
    queries, gallery = checked_vectors(queries, "queries"), checked_vectors(gallery, "gallery")
    positives = _checked_pairs(positives, len(queries), len(gallery), ("query", "gallery"))
    return _ranks(queries, gallery, positives, block)


def recall_at(ranks: Ranks, k: int) -> float:
    """Return the fraction of ranks below k.

    Raises:
        UsageError: there are no ranks.
    """
    if not len(ranks):
        raise UsageError(_("no ranks to measure; give at least one query"))
    return float(np.mean(ranks < k))


def recall_of(ranks: Ranks) -> Recall:
    """Return recall at 1, 5 and 10.

    Raises:
        UsageError: there are no ranks.
    """
    return Recall(recall_at(ranks, 1), recall_at(ranks, 5), recall_at(ranks, 10))


def mean_recall_by_query(ranks: Ranks) -> npt.NDArray[np.float64]:
    """Return each query's contribution (Q,) to mean recall: the mean of its hits at 1, 5 and 10."""
    result: npt.NDArray[np.float64] = np.mean(
        [ranks < 1, ranks < 5, ranks < 10], axis=0, dtype=np.float64
    )
    return result


def _recall(queries: Vectors, gallery: Vectors, positives: Pairs, block: int) -> Recall:
    with_positive, rows = np.unique(positives[:, 0], return_inverse=True)
    positives = np.stack([rows, positives[:, 1]], axis=1)
    return recall_of(_ranks(queries[with_positive], gallery, positives, block))


def _ranks(queries: Vectors, gallery: Vectors, positives: Pairs, block: int) -> Ranks:
    if queries.shape[1] != gallery.shape[1]:
        raise UsageError(
            _(
                "vectors of dimension {query_width} and {gallery_width} cannot be compared; embed "
                "both with one model",
                query_width=queries.shape[1],
                gallery_width=gallery.shape[1],
            )
        )
    positives = positives[np.argsort(positives[:, 0], kind="stable")]
    starts = np.searchsorted(positives[:, 0], np.arange(len(queries) + 1))
    unpaired = np.flatnonzero(np.diff(starts) == 0)
    if len(unpaired):
        raise UsageError(_("query {query} has no positive; remove such queries", query=unpaired[0]))
    ranks = np.empty(len(queries), np.int64)
    columns = np.arange(len(gallery))
    step = max(1, block // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ gallery.T  # (B, G)
        batch = slice(start, start + len(scores))
        first, last = starts[start], starts[batch.stop]
        row, column = positives[first:last, 0] - start, positives[first:last, 1]
        firsts = starts[batch] - first
        # Taken from the same product as all other scores: a separate one rounds differently.
        positive_scores = scores[row, column]
        best = np.maximum.reduceat(positive_scores, firsts)  # (B,)
        tied_best = np.where(positive_scores == best[row], column, len(gallery))
        best_column = np.minimum.reduceat(tied_best, firsts)
        ahead = scores == best[:, None]
        ahead &= columns < best_column[:, None]
        ahead |= scores > best[:, None]
        ranks[batch] = np.count_nonzero(ahead, axis=1)
    return ranks


def _checked_pairs(pairs: Pairs, left: int, right: int, what: tuple[str, str]) -> Pairs:
    """Return pairs (P, 2), checked to be rows of a ``left`` and a ``right`` number of items."""
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise UsageError(
            _(
                "pairs of shape {shape} and type {dtype}; expected integers (P, 2), rows of the "
                "{first_side} side and of the {second_side} side",
                shape=pairs.shape,
                dtype=pairs.dtype,
                first_side=what[0],
                second_side=what[1],
            )
        )
    if not len(pairs):
        raise UsageError(
            _(
                "no pair of {first_side} and {second_side} to measure; give at least one",
                first_side=what[0],
                second_side=what[1],
            )
        )
    outside = np.flatnonzero(((pairs < 0) | (pairs >= (left, right))).any(axis=1))
    if len(outside):
        raise UsageError(
            _(
                "pair {index} is {pair}, but there are only {left} and {right} rows; rows count "
                "from 0",
                index=outside[0],
                pair=tuple(pairs[outside[0]].tolist()),
                left=left,
                right=right,
            )
        )
    return pairs

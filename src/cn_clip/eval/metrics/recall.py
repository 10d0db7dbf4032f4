"""Recall of retrieval in both directions, exact, from embeddings; numpy alone.

Recall at k is the share of queries with a positive among their k best (Hodosh, Young and
Hockenmaier, "Framing Image Description as a Ranking Task", 2013); its mean over k is the mean
recall of Chinese-CLIP (Yang et al., 2022, arXiv:2211.01335, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import UsageError
from cn_clip.topk import Vectors, checked

Pairs = npt.NDArray[Any]
Ranks = npt.NDArray[np.int64]

_BLOCK = 1 << 24  # scores at a time, 64 MiB of float32


@dataclass(frozen=True, slots=True)
class Recall:
    """Recall at 1, 5 and 10, shares in [0, 1]."""

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
    """Measure how well images and texts find each other.

    Args:
        images: embeddings (N, D).
        texts: embeddings (M, D), each text once: equal texts compete with each other otherwise.
        pairs: rows (P, 2), an image's and a text's, of all that belong together, in any order. An
            image may have several texts and a text several images; one of them must be found.
            What is in no pair asks for nothing, but is there to be found by mistake.
        block: scores held in memory at a time.

    Raises:
        UsageError: an embedding is not finite, shapes do not fit, or there are no pairs.
    """
    images, texts = checked(images, "images"), checked(texts, "texts")
    pairs = _checked_pairs(pairs, len(images), len(texts), ("image", "text"))
    return Retrieval(
        text_to_image=_recall(texts, images, pairs[:, ::-1], block),
        image_to_text=_recall(images, texts, pairs, block),
    )


def ranks_of_best(
    queries: Vectors, gallery: Vectors, positives: Pairs, *, block: int = _BLOCK
) -> Ranks:
    """Return the rank (Q,) of each query's best positive, 0 for a hit at the top.

    The gallery is ranked by dot product, highest first, and equal products by row, lowest first:
    as a stable sort would. Exact; nothing is sorted, and no (Q, G) array is made.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        positives: rows (P, 2), a query's and a gallery's, in any order; each query needs one.
        block: scores held in memory at a time; at least one query's, which are G.

    Raises:
        UsageError: an embedding is not finite, shapes do not fit, or a query has no positive.
    """
    queries, gallery = checked(queries, "queries"), checked(gallery, "gallery")
    positives = _checked_pairs(positives, len(queries), len(gallery), ("query", "gallery"))
    return _ranks(queries, gallery, positives, block)


def recall_at(ranks: Ranks, k: int) -> float:
    """Return the share of ranks below k.

    Raises:
        UsageError: there are no ranks.
    """
    if not len(ranks):
        raise UsageError("no ranks, so there is no recall; give at least one query")
    return float(np.mean(ranks < k))


def _recall(queries: Vectors, gallery: Vectors, positives: Pairs, block: int) -> Recall:
    asking, rows = np.unique(positives[:, 0], return_inverse=True)
    positives = np.stack([rows, positives[:, 1]], axis=1)
    ranks = _ranks(queries[asking], gallery, positives, block)
    return Recall(recall_at(ranks, 1), recall_at(ranks, 5), recall_at(ranks, 10))


def _ranks(queries: Vectors, gallery: Vectors, positives: Pairs, block: int) -> Ranks:
    if queries.shape[1] != gallery.shape[1]:
        raise UsageError(
            f"vectors of {queries.shape[1]} and of {gallery.shape[1]} numbers do not compare; "
            "embed both with one model"
        )
    positives = positives[np.argsort(positives[:, 0], kind="stable")]
    starts = np.searchsorted(positives[:, 0], np.arange(len(queries) + 1))
    lonely = np.flatnonzero(np.diff(starts) == 0)
    if len(lonely):
        raise UsageError(f"query {lonely[0]} has no positive; leave such queries out")
    ranks = np.empty(len(queries), np.int64)
    columns = np.arange(len(gallery))
    step = max(1, block // max(1, len(gallery)))
    for at in range(0, len(queries), step):
        scores = queries[at : at + step] @ gallery.T  # (B, G)
        here = slice(at, at + len(scores))
        first, last = starts[at], starts[here.stop]
        row, column = positives[first:last, 0] - at, positives[first:last, 1]
        firsts = starts[here] - first
        # The positives' scores come out of this very product: another one rounds differently.
        scored = scores[row, column]
        best = np.maximum.reduceat(scored, firsts)  # (B,)
        tied_best = np.where(scored == best[row], column, len(gallery))
        best_column = np.minimum.reduceat(tied_best, firsts)
        ahead = scores == best[:, None]
        ahead &= columns < best_column[:, None]
        ahead |= scores > best[:, None]
        ranks[here] = np.count_nonzero(ahead, axis=1)
    return ranks


def _checked_pairs(pairs: Pairs, left: int, right: int, what: tuple[str, str]) -> Pairs:
    """Return pairs (P, 2) that are within (``left``, ``right``)."""
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise UsageError(
            f"pairs of shape {pairs.shape} and type {pairs.dtype}; expected whole numbers (P, 2), "
            f"a row of the {what[0]} side and one of the {what[1]} side"
        )
    if not len(pairs):
        raise UsageError(f"no pair of {what[0]} and {what[1]}, so there is nothing to measure")
    outside = np.flatnonzero(((pairs < 0) | (pairs >= (left, right))).any(axis=1))
    if len(outside):
        raise UsageError(
            f"pair {outside[0]} is {tuple(pairs[outside[0]].tolist())}, but there are only {left} "
            f"and {right} rows; count from 0"
        )
    return pairs

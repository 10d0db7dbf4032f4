"""Exact top-k search of a gallery, computed in blocks of scores; numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import UsageError
from cn_clip.translation import _

Vectors = npt.NDArray[Any]  # (N, D)

_BLOCK = 1 << 23  # scores in memory at a time, 32 MiB of float32


@dataclass(frozen=True, slots=True)
class TopK:
    """Gallery rows ``indexes`` int64 (Q, k), best first, and their ``scores`` (Q, k)."""

    indexes: npt.NDArray[np.int64]
    scores: npt.NDArray[Any]


def top_k(
    queries: Vectors,
    gallery: Vectors,
    k: int,
    *,
    block: int = _BLOCK,
    tick: Callable[[int], None] = lambda _: None,
) -> TopK:
    """Return the k gallery rows with the highest dot product for each query.

    Ties rank by row, lowest first, as in a stable sort. The gallery is split into groups of about
    sqrt(G / k) rows; only the k groups with the highest maxima can contain a top-k row, so only
    the maxima and the rows of k groups are sorted. No (Q, G) array is allocated.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        k: results per query, from 1 to G.
        block: scores in memory at a time; at least the G scores of one query.
        tick: called with the number of queries just done.

    Raises:
        UsageError: a vector is not finite, dimensions differ, or k is out of range.
    """
    queries, gallery = checked_vectors(queries, "queries"), checked_vectors(gallery, "gallery")
    if queries.shape[1] != gallery.shape[1]:
        raise UsageError(
            _(
                "vectors of dimension {query_width} and {gallery_width} cannot be compared; embed "
                "both with one model",
                query_width=queries.shape[1],
                gallery_width=gallery.shape[1],
            )
        )
    if not 1 <= k <= len(gallery):
        raise UsageError(
            _(
                "k = {k} does not fit a gallery of {gallery_count} rows; give 1 to {gallery_count}",
                k=k,
                gallery_count=len(gallery),
            )
        )
    width = max(1, math.isqrt(len(gallery) // k))
    starts = np.arange(0, len(gallery), width)
    indexes = np.empty((len(queries), k), np.int64)
    scores = np.empty((len(queries), k), np.result_type(queries, gallery))
    step = max(1, block // len(gallery))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        products = queries[rows] @ gallery.T  # (B, G)
        indexes[rows] = _top_columns(products, k, starts, width)
        scores[rows] = np.take_along_axis(products, indexes[rows], axis=1)
        tick(len(products))
    return TopK(indexes, scores)


def _top_columns(
    products: npt.NDArray[Any], k: int, starts: npt.NDArray[np.int64], width: int
) -> npt.NDArray[np.int64]:
    """Return the columns (B, k) of the k highest products of each row, in stable order.

    Groups are ranked by maximum, ties by position. A group ranked below k others contains nothing
    that ranks above their k maxima.
    """
    maxima = np.maximum.reduceat(products, starts, axis=1)  # (B, groups)
    groups = np.argsort(-maxima, axis=1, kind="stable")[:, :k]
    groups.sort(axis=1)  # candidates in column order, which the stable sort keeps for ties
    columns = (starts[groups][:, :, None] + np.arange(width)).reshape(len(products), -1)
    beyond = columns >= products.shape[1]  # the last group may be narrower
    candidates = np.take_along_axis(products, np.where(beyond, 0, columns), axis=1)
    candidates[beyond] = -np.inf
    order = np.argsort(-candidates, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(columns, order, axis=1)


def checked_vectors(vectors: Vectors, what: str) -> Vectors:
    """Return vectors (N, D) as float32 or float64.

    Raises:
        UsageError: the shape is not (N, D), or a value is not finite; the message names ``what``.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2:
        raise UsageError(
            _("the {what} have the shape {shape}; expected (N, D)", what=what, shape=vectors.shape)
        )
    vectors = vectors.astype(np.result_type(vectors, np.float32), copy=False)
    with np.errstate(invalid="ignore"):  # inf - inf
        sums = vectors.sum(axis=1, dtype=np.float64)  # not finite if one value is not
    invalid = np.flatnonzero(~np.isfinite(sums))
    if len(invalid):
        raise UsageError(
            _(
                "row {row} of the {what} contains NaN or infinity ({count} rows in all do); embed "
                "them again in float32",
                row=invalid[0],
                what=what,
                count=len(invalid),
            )
        )
    return vectors

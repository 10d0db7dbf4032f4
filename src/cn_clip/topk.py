"""The best of a gallery for each query, exact, a block of scores at a time; numpy alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import UsageError

Vectors = npt.NDArray[Any]  # (N, D)

_BLOCK = 1 << 23  # scores at a time, 32 MiB of float32


@dataclass(frozen=True, slots=True)
class TopK:
    """``indexes`` int64 (Q, k) of gallery rows, best first, and their ``scores`` (Q, k)."""

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

    Equal products come by row, lowest first, as a stable sort of the whole gallery has them. The
    gallery is cut into some sqrt(G / k) wide groups; only the k groups with the best maxima can
    hold one of the k best, so little more than the maxima is sorted. No (Q, G) array is made.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        k: how many, at least 1 and at most G.
        block: scores held in memory at a time; at least one query's, which are G.
        tick: called with the number of queries just done, for a progress bar.

    Raises:
        UsageError: an embedding is not finite, widths differ, or k does not fit the gallery.
    """
    queries, gallery = checked(queries, "queries"), checked(gallery, "gallery")
    if queries.shape[1] != gallery.shape[1]:
        raise UsageError(
            f"vectors of {queries.shape[1]} and of {gallery.shape[1]} numbers do not compare; "
            "embed both with one model"
        )
    if not 1 <= k <= len(gallery):
        raise UsageError(
            f"the best {k} of a gallery of {len(gallery)} cannot be had; ask for 1 to "
            f"{len(gallery)}"
        )
    width = max(1, math.isqrt(len(gallery) // k))
    starts = np.arange(0, len(gallery), width)
    indexes = np.empty((len(queries), k), np.int64)
    scores = np.empty((len(queries), k), np.result_type(queries, gallery))
    step = max(1, block // len(gallery))
    for at in range(0, len(queries), step):
        here = slice(at, at + step)
        products = queries[here] @ gallery.T  # (B, G)
        indexes[here] = _best(products, k, starts, width)
        scores[here] = np.take_along_axis(products, indexes[here], axis=1)
        tick(len(products))
    return TopK(indexes, scores)


def _best(
    products: npt.NDArray[Any], k: int, starts: npt.NDArray[np.int64], width: int
) -> npt.NDArray[np.int64]:
    """Return the columns (B, k) of the k highest of each row, in a stable order.

    A group that comes after k others, by its maximum and then its place, holds nothing that comes
    before their k maxima.
    """
    maxima = np.maximum.reduceat(products, starts, axis=1)  # (B, groups)
    groups = np.argsort(-maxima, axis=1, kind="stable")[:, :k]
    groups.sort(axis=1)  # so that candidates are by column, and a stable sort keeps that
    columns = (starts[groups][:, :, None] + np.arange(width)).reshape(len(products), -1)
    beyond = columns >= products.shape[1]  # of the last group, which may be narrower
    candidates = np.take_along_axis(products, np.where(beyond, 0, columns), axis=1)
    candidates[beyond] = -np.inf
    order = np.argsort(-candidates, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(columns, order, axis=1)


def checked(vectors: Vectors, what: str) -> Vectors:
    """Return vectors (N, D) as float32 or float64.

    Raises:
        UsageError: they are of another shape, or a number is not finite; ``what`` is named.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2:
        raise UsageError(f"the {what} have the shape {vectors.shape}; expected (N, D)")
    vectors = vectors.astype(np.result_type(vectors, np.float32), copy=False)
    with np.errstate(invalid="ignore"):  # inf - inf
        sums = vectors.sum(axis=1, dtype=np.float64)  # not finite if one number is not
    strange = np.flatnonzero(~np.isfinite(sums))
    if len(strange):
        raise UsageError(
            f"row {strange[0]} of the {what} holds NaN or infinity, as do {len(strange)} rows in "
            "all; embed them anew, in float32"
        )
    return vectors

"""Exact search in a memory-mapped file of float16 vectors, in blocks, by several threads.

A scan finds candidates: all rows whose score may belong to the k best, given the largest error of
the scan. The candidates alone are scored again, in float64, so that the result is exact. The scan
reads the float16 vectors by numkong, which rounds the queries to float16; by numpy, if numkong is
not installed; or the int8 codes of ``cn_clip.search.codes``, at half the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import UsageError
from cn_clip.processes import usable_cpus
from cn_clip.search.codes import Codes
from cn_clip.search.kernels import Scan, float_scan, has_numkong
from cn_clip.topk import TopK, checked_vectors
from cn_clip.translation import _

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

_BLOCK_BYTES = 8 << 20  # of vectors per call of a kernel: few calls, scores that stay in the cache
_QUERIES = 64  # scanned together; numkong is slower with more
_INLINE_BYTES = 4 << 20  # below it, starting threads takes longer than the scan
_GATHERED = 0.2  # of the rows: if fewer are allowed, they are read one by one instead of scanned


def search_exact(
    vectors: Array,
    queries: Array,
    k: int,
    *,
    allowed: Mask | None = None,
    codes: Codes | None = None,
    threads: int | None = None,
) -> TopK:
    """Return the k rows with the highest dot product for each query.

    Ties rank by row, lowest first. Rows of zeros, and rows that are not finite, are never returned.
    If fewer than k rows remain, all of them are returned.

    Args:
        vectors: float16 (N, D), unit vectors or rows of zeros; a memory map is read block by block.
        queries: (Q, D), unit vectors.
        k: results per query, at least 1.
        allowed: (N,), which rows may be returned; None for all.
        codes: of the first rows of ``vectors``; scanned instead of them. The scores are still
            exact, but a row of the k best may be missed (in `benchmarks/search_vectors.py` fewer
            than 1 in 1,000).
        threads: by default one per usable CPU.

    Returns:
        Rows int64 (Q, k) and scores float32 (Q, k).

    Raises:
        UsageError: k is below 1, a query is not finite, or the dimensions differ.
    """
    queries = checked_search(vectors, queries, k)
    vectors = vectors.view(np.ndarray)  # slices of a memmap are slow
    threads = usable_cpus() if threads is None else threads
    rows = None
    if allowed is not None:
        count = np.count_nonzero(allowed)
        if count <= _GATHERED * len(vectors):
            rows, codes = np.flatnonzero(allowed), None
    results = [
        _search(vectors, queries[start : start + _QUERIES], k, allowed, rows, codes, threads)
        for start in range(0, len(queries), _QUERIES)
    ]
    return joined(results, k)


def checked_search(vectors: Array, queries: Array, k: int) -> Array:
    """Return the queries as float32, checked against the vectors.

    Raises:
        UsageError: as ``search_exact``.
    """
    queries = checked_vectors(queries, "queries").astype(np.float32, copy=False)
    if queries.shape[1] != vectors.shape[1]:
        raise UsageError(
            _(
                "vectors of dimension {query_width} and {gallery_width} cannot be compared; embed "
                "both with one model",
                query_width=queries.shape[1],
                gallery_width=vectors.shape[1],
            )
        )
    if k < 1:
        raise UsageError(_("k = {k}; give at least 1", k=k))
    return queries


def joined(results: list[TopK], k: int) -> TopK:
    """Return the results of several batches of queries as one, with as many rows as all have."""
    k = min((result.indexes.shape[1] for result in results), default=k)
    if not results:
        return TopK(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
    return TopK(
        np.concatenate([result.indexes[:, :k] for result in results]),
        np.concatenate([result.scores[:, :k] for result in results]),
    )


def _search(
    vectors: Array,
    queries: Array,
    k: int,
    allowed: Mask | None,
    rows: Rows | None,
    codes: Codes | None,
    threads: int,
) -> TopK:
    """Search one batch of queries among ``rows``, or, if None, all rows that are ``allowed``."""
    if rows is not None:
        scan = float_scan(lambda block: np.take(vectors, rows[block], axis=0), queries)
        lengths = [len(rows)]
    else:
        scan = float_scan(lambda block: vectors[block], queries)
        lengths = [len(vectors)]
        if codes is not None and has_numkong():
            coded = min(codes.rows, len(vectors))
            scan = _either(codes.scan(queries), scan, coded)
            lengths = [coded, len(vectors) - coded]
    size = max(1, _BLOCK_BYTES // (2 * vectors.shape[1]))
    found = _candidates(
        scan,
        _blocks(lengths, size),
        k,
        None if rows is not None else allowed,
        lambda some: vectors[some] if rows is None else vectors[rows[some]],
        1 if vectors.shape[1] * sum(lengths) * 2 <= _INLINE_BYTES else threads,
    )
    if rows is not None:
        found = [rows[some] for some in found]
    result, invalid = best_of(vectors, queries, found, k)
    if not len(invalid):
        return result
    # Infinity that numpy's scan took for a number, or rows that were purged after they were coded.
    # They may have hidden others.
    if rows is not None:
        return _search(vectors, queries, k, None, np.setdiff1d(rows, invalid), None, threads)
    allowed = np.ones(len(vectors), bool) if allowed is None else allowed.copy()
    allowed[invalid] = False
    return _search(vectors, queries, k, allowed, None, None, threads)


def _either(first: Scan, second: Scan, boundary: int) -> Scan:
    """Return a scan by ``first`` below a row, and by ``second`` from it."""

    def score(block: slice) -> Array:
        return first.score(block) if block.stop <= boundary else second.score(block)

    return Scan(score, np.maximum(first.error, second.error))


def _blocks(lengths: list[int], size: int) -> list[slice]:
    """Split consecutive ranges of rows into slices of at most ``size`` rows."""
    blocks, start = [], 0
    for length in lengths:
        stop = start + length
        blocks += [slice(at, min(at + size, stop)) for at in range(start, stop, size)]
        start = stop
    return blocks


def _candidates(
    scan: Scan,
    blocks: list[slice],
    k: int,
    allowed: Mask | None,
    read: Callable[[Rows], Array],
    threads: int,
) -> list[Rows]:
    """Return for each query the rows that may be among the k best."""
    width = len(scan.error)
    # A row below the k-th best of the rows so far, by more than both errors, is no candidate.
    # Threads may overwrite a higher value by a lower one; that only keeps more rows.
    lowest = np.full(width, -np.inf, np.float32)
    margin = (2 * scan.error).astype(np.float32)
    found: list[tuple[Rows, Rows, Array]] = []
    source = iter(blocks)

    def work() -> None:
        for block in source:
            scores = scan.score(block)  # (B, Q)
            if allowed is not None:
                scores[~allowed[block]] = -np.inf
            if not np.isfinite(scores.max()):
                scores[~np.isfinite(scores)] = -np.inf
            zeros = np.flatnonzero(scores[:, 0] == 0)
            if len(zeros):
                scores[zeros[~read(zeros + block.start).any(axis=1)]] = -np.inf
            at, query = np.divmod(np.flatnonzero(scores > lowest), width)
            values = scores[at, query]
            found.append((at + block.start, query, values))
            for number in np.flatnonzero(np.bincount(query, minlength=width) >= k):
                mine = values if width == 1 else values[query == number]
                bound = np.partition(mine, -k)[-k] - margin[number]
                lowest[number] = max(lowest[number], np.nextafter(bound, np.float32(-np.inf)))

    if threads == 1 or len(blocks) == 1:
        work()
    else:
        with ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(work) for _unused in range(threads)]:
                future.result()
    rows, query, values = (
        (np.concatenate(parts) for parts in zip(*found, strict=True))
        if (found)
        else (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    )
    order = np.argsort(query, kind="stable")
    ends = np.cumsum(np.bincount(query, minlength=width))
    results = []
    for number, some in enumerate(np.split(order, ends[:-1])):
        if len(some) > k:
            bound = np.partition(values[some], -k)[-k] - margin[number]
            some = some[values[some] >= bound]
        results.append(rows[some])
    return results


def best_of(vectors: Array, queries: Array, candidates: list[Rows], k: int) -> tuple[TopK, Rows]:
    """Score candidates exactly; return the k best for each query, and the invalid rows: those of
    zeros, and those that are not finite.

    Args:
        vectors: float16 (N, D).
        queries: float32 (Q, D).
        candidates: rows for each query, each once.
        k: fewer are returned if one query has fewer candidates.
    """
    results, invalid = [], [np.empty(0, np.int64)]
    for query, rows in zip(queries, candidates, strict=True):
        rows = np.sort(rows)
        scores = _exact_scores(vectors[rows], query)
        valid = np.isfinite(scores)
        if not valid.all():
            invalid.append(rows[~valid])
            rows, scores = rows[valid], scores[valid]
        order = np.argsort(-scores, kind="stable")[:k]
        results.append(TopK(rows[order][None], scores[order].astype(np.float32)[None]))
    return joined(results, k), np.unique(np.concatenate(invalid))


def _exact_scores(rows: Array, query: Array) -> npt.NDArray[np.float64]:
    """Return the dot products (n,) of rows (n, D) with a query (D,); rows of zeros get -inf."""
    # Not a matrix product, whose rounding depends on the position of a row: equal rows are ties.
    with np.errstate(invalid="ignore"):  # infinity times 0
        scores: npt.NDArray[np.float64] = (rows.astype(np.float64) * query.astype(np.float64)).sum(
            axis=1
        )
    zeros = np.flatnonzero(scores == 0)
    scores[zeros[~rows[zeros].any(axis=1)]] = -np.inf
    return scores

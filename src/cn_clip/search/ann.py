"""An approximate index of a vector file: cells of similar rows, scanned as int8 codes.

An inverted file (Jegou et al., Product Quantization for Nearest Neighbor Search, 2011, section 4):
spherical k-means splits the rows into cells, and a query scans the cells whose centroids are
nearest to it. The codes of a cell lie together, so a cell is one read of consecutive bytes of a
memory map. The best candidates are scored exactly, from the vectors. How many cells are scanned is
chosen when the index is built, so that a sample of queries reaches a recall.

The index is one file in a folder that may be deleted at any time. It is written beside its place
and renamed. It is only used for the vectors it was built from: its small parts have a checksum, a
sample of its codes is compared with the vectors. Every value that is used as a position is checked,
so a file of others can hide results but do nothing else.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import UsageError
from cn_clip.format_version import FIELD, Format
from cn_clip.processes import usable_cpus
from cn_clip.publish import atomic_file, map_write_errors
from cn_clip.search.codes import INT8_MAX, agree, encode
from cn_clip.search.exact import best_of, checked_search, search_exact
from cn_clip.search.kernels import float32_of, has_numkong, products_with
from cn_clip.topk import TopK
from cn_clip.translation import _

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

FORMAT = Format("search index", 1)
FILE = "ann.index"
_HEADER = 4096  # bytes; sections start at multiples of it
_TUNED_K = 10  # results per query that the recall is measured for
_TRAINED = 40  # rows per cell that the centroids are fitted to
_ITERATIONS = 10
_BLOCK = 1 << 13
_CANDIDATES = 100  # scored exactly, at least
_EXACT_SHARE = 0.05  # of the rows: if fewer are allowed, they are searched exactly
_GROWTH = 0.1  # of the rows: after as many new ones, an index is worth rebuilding


@dataclass(frozen=True, slots=True)
class AnnIndex:
    """An index of the first ``rows`` rows of ``vectors``.

    Attributes:
        vectors: float16 (N, D), with rows appended since the index was built.
        rows: number of indexed rows, those of zeros included.
        probes: cells that a query scans.
        centroids: float16 (L, D), unit vectors.
        starts: int64 (L + 1,), where the rows of each cell start in the next three.
        ids: int32 (M,), rows of ``vectors``.
        scales: float32 (M,).
        codes: int8 (M, D).
    """

    vectors: Array
    rows: int
    probes: int
    centroids: Array
    starts: Rows
    ids: npt.NDArray[np.int32]
    scales: npt.NDArray[np.float32]
    codes: npt.NDArray[np.int8]

    @classmethod
    def open(cls, folder: Path, vectors: Array) -> AnnIndex | None:
        """Return the index in a folder; None if there is none for these vectors, or a damaged one.

        Args:
            folder: the cache of one vector file.
            vectors: float16 (N, D); rows after the indexed ones are allowed.
        """
        try:
            with (folder / FILE).open("rb") as stream:
                head = stream.read(_HEADER)
            about = json.loads(head.rstrip(b"\0"))
            layout = _Layout(*(_count(about[name]) for name in ("dim", "lists", "members")))
            rows, probes = _count(about["rows"]), _count(about["probes"])
            if about[FIELD] != str(FORMAT) or layout.dim != vectors.shape[1]:
                return None
            if not (layout.members <= rows <= len(vectors) and 0 < probes <= layout.lists):
                return None
            parts = layout.mapped(folder / FILE)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        _unused, starts, ids, scales, codes = parts
        if about.get("digest") != _digest(about, parts[:-1]):
            return None
        index = cls(vectors.view(np.ndarray), rows, probes, *parts)
        valid = (
            starts[0] == 0
            and starts[-1] == layout.members
            and bool((np.diff(starts) >= 0).all())
            and ids.min(initial=0) >= 0
            and ids.max(initial=0) < rows
        )
        return index if valid and agree(codes, scales, vectors, ids) else None

    @classmethod
    def build(
        cls, vectors: Array, folder: Path, queries_sample: Array, *, recall: float = 0.98
    ) -> AnnIndex:
        """Build the index of a vector file, write it atomically, and return it.

        It takes about a minute for a million rows on two cores; an index in use is not disturbed.

        Args:
            vectors: float16 (N, D), unit vectors or rows of zeros, which are not indexed.
            folder: the cache of one vector file; made if missing.
            queries_sample: (S, D), unit vectors, of the kind that will be searched for: texts, not
                images. A few hundred.
            recall: the share of the 10 best rows that the sample finds at least.

        Raises:
            UsageError: there is no vector or no query, or a query does not fit.
            CNClipError: the folder is not writable, or the disk is full.
        """
        vectors = vectors.view(np.ndarray)
        queries = checked_search(vectors, queries_sample, _TUNED_K)
        members = _nonzero_rows(vectors)
        if not len(members) or not len(queries):
            raise UsageError(
                _(
                    "an index needs vectors and sample queries; there are {members} and {queries}",
                    members=len(members),
                    queries=len(queries),
                )
            )
        centroids = _centroids(vectors, members)
        cells = _assigned(vectors, members, centroids)
        order = np.argsort(cells, kind="stable")
        starts = np.searchsorted(cells[order], np.arange(len(centroids) + 1)).astype(np.int64)
        ids = members[order].astype(np.int32)
        cell_of = np.full(len(vectors), -1, np.int32)
        cell_of[members] = cells
        probes = _probes(vectors, queries, centroids, cell_of, recall)
        about = {
            FIELD: str(FORMAT),
            "rows": len(vectors),
            "members": len(members),
            "dim": vectors.shape[1],
            "lists": len(centroids),
            "probes": probes,
            "recall": recall,
        }
        with map_write_errors(folder / FILE), atomic_file(folder / FILE) as temporary:
            _write(temporary, about, vectors, centroids, starts, ids)
        index = cls.open(folder, vectors)
        assert index is not None, "an index just written is valid"
        return index

    @property
    def is_outgrown(self) -> bool:
        """Whether so many rows were appended that rebuilding the index pays."""
        return len(self.vectors) - self.rows > _GROWTH * self.rows

    def search(
        self, queries: Array, k: int, *, allowed: Mask | None = None, threads: int | None = None
    ) -> TopK:
        """Return about the k best rows for each query; their scores are exact.

        Rows that were appended after the index was built are searched exactly. So is everything,
        if few rows are allowed, or if k is large.

        Args, returns and raises as ``cn_clip.search.exact.search_exact``.
        """
        queries = checked_search(self.vectors, queries, k)
        count = self.rows if allowed is None else np.count_nonzero(allowed[: self.rows])
        if count <= max(_EXACT_SHARE * self.rows, _CANDIDATES * k):
            return search_exact(self.vectors, queries, k, allowed=allowed, threads=threads)
        # More results are in more cells.
        probes = min(len(self.centroids), math.ceil(self.probes * max(1, (k / _TUNED_K) ** 0.5)))
        wanted = max(_CANDIDATES, 4 * k)

        def candidates(query: Array) -> Rows:
            return self._candidates(query, probes, wanted, allowed)

        threads = usable_cpus() if threads is None else threads
        if threads > 1 and len(queries) > 1:
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(candidates, queries))
        else:
            found = [candidates(query) for query in queries]
        result, _invalid = best_of(self.vectors, queries, found, k)
        if result.indexes.shape[1] < k:  # too many rows were purged since the index was built
            return search_exact(self.vectors, queries, k, allowed=allowed, threads=threads)
        tail = self.vectors[self.rows :]
        if not len(tail):
            return result
        rest = None if allowed is None else allowed[self.rows :]
        newer = search_exact(tail, queries, k, allowed=rest, threads=threads)
        return _merged(result, TopK(newer.indexes + self.rows, newer.scores), k)

    def _candidates(self, query: Array, probes: int, wanted: int, allowed: Mask | None) -> Rows:
        """Return the ``wanted`` rows of the nearest cells whose codes have the highest scores."""
        scores = _centroid_scores(self.centroids, query[None])[0]
        if allowed is None:
            spans = self._spans(np.argpartition(-scores, probes - 1)[:probes])
            ids = np.concatenate([self.ids[span] for span in spans])
            keep = None
        else:
            # As many allowed rows are scanned as rows without a filter, in however many cells.
            order = np.argsort(-scores)
            enough = probes * len(self.ids) / len(order)
            while True:
                spans = self._spans(order[:probes])
                ids = np.concatenate([self.ids[span] for span in spans])
                keep = np.flatnonzero(allowed[ids])
                if len(keep) >= enough or probes >= len(order):
                    break
                probes = math.ceil(probes * min(8, max(1.2, 1.1 * enough / max(1, len(keep)))))
            ids = ids[keep]
        multiply = _products(query)
        values = np.concatenate([multiply(self.codes[span]) for span in spans])
        values = values * np.concatenate([self.scales[span] for span in spans])
        values = values if keep is None else values[keep]
        if len(values) > wanted:
            ids = ids[np.argpartition(values, -wanted)[-wanted:]]
        return ids.astype(np.int64)

    def _spans(self, cells: Rows) -> list[slice]:
        """Return where the rows of cells are in the index; neighbours are joined."""
        cells = np.sort(cells)
        first = np.flatnonzero(np.diff(cells, prepend=-2) != 1)
        last = np.append(first[1:], len(cells)) - 1
        starts, stops = self.starts[cells[first]].tolist(), self.starts[cells[last] + 1].tolist()
        return [slice(a, b) for a, b in zip(starts, stops, strict=True)]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the parts of an index are in its file."""

    dim: int
    lists: int
    members: int

    def mapped(self, path: Path) -> tuple[Array, Array, Array, Array, Array]:
        """Map the parts of a file into memory.

        Raises:
            OSError, ValueError: the file is too short.
        """
        shapes: list[tuple[type, tuple[int, ...]]] = [
            (np.float16, (self.lists, self.dim)),
            (np.int64, (self.lists + 1,)),
            (np.int32, (self.members,)),
            (np.float32, (self.members,)),
            (np.int8, (self.members, self.dim)),
        ]
        parts, offset = [], _HEADER
        for dtype, shape in shapes:
            parts.append(np.memmap(path, dtype, "r", offset, shape).view(np.ndarray))
            offset = _aligned(offset + parts[-1].nbytes)
        first, second, third, fourth, fifth = parts
        return first, second, third, fourth, fifth


def _write(
    path: Path, about: dict[str, Any], vectors: Array, centroids: Array, starts: Rows, ids: Array
) -> None:
    """Write an index; the codes are made in the order of ``ids``."""
    blocks = range(0, len(ids), _BLOCK)
    scales = np.empty(len(ids), np.float32)
    end = _HEADER
    with path.open("wb") as stream, ThreadPoolExecutor(usable_cpus()) as pool:
        parts: tuple[Array, ...] = (centroids, starts, ids, scales)
        offsets = []
        for part in parts:
            offsets.append(end)
            end = _aligned(end + part.nbytes)
        stream.seek(end)
        coded = pool.map(lambda at: encode(vectors[ids[at : at + _BLOCK]]), blocks)
        for at, (codes, some) in zip(blocks, coded, strict=True):
            scales[at : at + _BLOCK] = some
            stream.write(codes.data)
        for offset, part in zip(offsets, parts, strict=True):
            stream.seek(offset)
            stream.write(part.data)
        head = json.dumps(about | {"digest": _digest(about, parts)}).encode()
        stream.seek(0)
        stream.write(head.ljust(_HEADER, b"\0"))


def _aligned(offset: int) -> int:
    return -(-offset // _HEADER) * _HEADER


def _digest(about: dict[str, Any], parts: tuple[Array, ...]) -> str:
    """Return a checksum of the header and of all parts but the codes."""
    facts = {name: value for name, value in about.items() if name != "digest"}
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for part in parts:
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _count(value: Any) -> int:
    """Return a number from a header.

    Raises:
        ValueError: it is not a positive integer below 2^31.
    """
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError(value)
    return value


def _nonzero_rows(vectors: Array) -> Rows:
    """Return the rows that are not all zeros."""
    blocks = range(0, len(vectors), _BLOCK)
    found = [np.flatnonzero(vectors[at : at + _BLOCK].any(axis=1)) + at for at in blocks]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _centroids(vectors: Array, members: Rows) -> npt.NDArray[np.float16]:
    """Return centroids (L, D) of spherical k-means of a sample of the rows."""
    rng = np.random.default_rng(0)
    lists = max(1, min(len(members), round(4 * math.sqrt(len(members)))))
    sample = rng.permutation(members)[: _TRAINED * lists]
    centroids = _unit(float32_of(vectors[sample[:lists]]))  # in random order
    sample = np.sort(sample)
    rows = float32_of(vectors[sample])
    for _unused in range(_ITERATIONS):
        cells = _assigned(vectors, sample, centroids)
        order = np.argsort(cells, kind="stable")
        used, first = np.unique(cells[order], return_index=True)
        centroids[used] = _unit(np.add.reduceat(rows[order], first, axis=0))
        empty = np.setdiff1d(np.arange(lists), used)
        centroids[empty] = _unit(rows[rng.integers(len(rows), size=len(empty))])
    return centroids.astype(np.float16)


def _unit(rows: Array) -> Array:
    norms: Array = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def _assigned(vectors: Array, rows: Rows, centroids: Array) -> npt.NDArray[np.int32]:
    """Return the nearest centroid of each row (n,), as far as int8 codes show."""
    step = np.abs(centroids).max().astype(np.float32) / INT8_MAX  # one scale: products compare
    coded = np.rint(centroids.astype(np.float32) / step).astype(np.int8)
    size = max(1, (1 << 22) // len(centroids))  # 16 MiB of products
    multiply = _products(coded, encoded=True)

    def nearest(at: int) -> Rows:
        codes, _unused = encode(vectors[rows[at : at + size]])
        found: Rows = np.argmax(multiply(codes).reshape(len(codes), -1), axis=1)
        return found

    with ThreadPoolExecutor(usable_cpus()) as pool:
        cells = list(pool.map(nearest, range(0, len(rows), size)))
    return np.concatenate(cells).astype(np.int32)


def _products(queries: Array, *, encoded: bool = False) -> Callable[[Array], Array]:
    """Return a function from codes int8 (B, D) to their products (B * Q,) with queries."""
    queries = np.atleast_2d(queries)
    coded = queries if encoded else encode(queries)[0]
    if has_numkong():
        multiply = products_with(coded)
        return lambda codes: multiply(codes).reshape(-1)
    transposed = coded.T.astype(np.float32)
    return lambda codes: (codes.astype(np.float32) @ transposed).reshape(-1)


def _centroid_scores(centroids: Array, queries: Array) -> Array:
    """Return the scores (Q, L) that rank cells for queries."""
    if has_numkong():
        return products_with(queries.astype(np.float16))(centroids).T
    products: Array = float32_of(centroids) @ queries.T
    return products.T


def _probes(vectors: Array, queries: Array, centroids: Array, cell_of: Array, recall: float) -> int:
    """Return the number of cells in which the queries find their best rows: the share found, less
    two standard errors, is at least ``recall``."""
    best = search_exact(vectors, queries, _TUNED_K).indexes  # (Q, k)
    order = np.argsort(-_centroid_scores(centroids, queries), axis=1)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(len(centroids))[None], axis=1)
    needed = np.take_along_axis(ranks, cell_of[best], axis=1)  # (Q, k): probes before it is found

    def is_enough(probes: int) -> bool:
        found = (needed < probes).mean(axis=1)
        return bool(found.mean() - 2 * found.std() / math.sqrt(len(found)) >= recall)

    choices = range(1, len(centroids))
    return choices[0] + bisect.bisect_left(choices, True, key=is_enough) if choices else 1


def _merged(first: TopK, second: TopK, k: int) -> TopK:
    """Return the k best of two results; rows of the first are lower."""
    indexes = np.concatenate([first.indexes, second.indexes], axis=1)
    scores = np.concatenate([first.scores, second.scores], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return TopK(
        np.take_along_axis(indexes, order, axis=1), np.take_along_axis(scores, order, axis=1)
    )

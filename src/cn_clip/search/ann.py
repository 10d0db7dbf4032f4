"""An approximate index of a vector file, by faiss: cells of similar rows, scanned as int8 codes.

The index is faiss's ``IVF{lists},SQ8`` (Douze et al., The Faiss library, arXiv:2401.08281): a query
scans the codes of the cells whose centroids are nearest to it. The best candidates are scored
exactly, from the vectors. How many cells are scanned is chosen when the index is built, so that a
sample of queries reaches a recall.

Files in the folder: ``ann.faiss``, and ``ann.json``, which is written last and says what the index
was built from. Both may be deleted at any time. The codes are mapped into memory. A checksum of a
sample of the vectors, and one of the size of the index, of all before its codes and of samples of
those, are compared before faiss reads the file. Damage between the samples can hide results, but
never returns a wrong score. A checksum is no signature: the folder must be the user's own.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cn_clip.errors import UsageError
from cn_clip.files import read_file
from cn_clip.format_version import FIELD, Format
from cn_clip.processes import usable_cpus
from cn_clip.publish import atomic_file, map_write_errors, write_text
from cn_clip.search.exact import best_of, checked_search, search_exact
from cn_clip.search.kernels import float32_of
from cn_clip.topk import TopK
from cn_clip.translation import _

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

FORMAT = Format("search index", 2)
FILE, ABOUT = "ann.faiss", "ann.json"
_TUNED_K = 10  # results per query that the recall is measured for
_TRAINED = 40  # rows per cell that the centroids are fitted to; faiss advises 39 or more
_BLOCK = 1 << 14  # rows added at a time
_CANDIDATES = 100  # scored exactly, at least
_EXACT_SHARE = 0.05  # of the rows: if fewer are allowed, they are searched exactly
_MOSTLY = 0.8  # of the rows or candidates: if as many are allowed, the others change little
_GROWTH = 0.1  # of the rows: after as many new ones, an index is worth rebuilding
_SAMPLE = 64  # rows of the vectors, and parts of the codes, in a checksum
_SAMPLE_BYTES = 4096


@cache
def load_faiss() -> Any | None:
    """Return the module faiss; None if it is not installed, or not on Linux.

    Elsewhere, faiss-cpu and torch each load an OpenMP runtime of their own, and the second can end
    the process (faiss-wheels, issue 73).
    """
    if sys.platform != "linux":
        return None
    try:
        with warnings.catch_warnings():
            # Of SWIG's types, on import, from Python 3.12 on.
            warnings.filterwarnings("ignore", "builtin type (SwigPy|swigvar)", DeprecationWarning)
            import faiss
    except ImportError:
        return None
    return faiss


@dataclass(frozen=True, slots=True)
class AnnIndex:
    """An index of the first ``rows`` rows of ``vectors``.

    Attributes:
        vectors: float16 (N, D), with rows appended since the index was built.
        rows: number of indexed rows, those of zeros included.
        lists: number of cells.
        probes: cells that a query scans.
        index: faiss's index; its ids are rows.
    """

    vectors: Array
    rows: int
    lists: int
    probes: int
    index: Any

    @classmethod
    def open(cls, folder: Path, vectors: Array) -> AnnIndex | None:
        """Return the index in a folder; None if there is none for these vectors, a damaged one, or
        no faiss.

        Args:
            folder: the cache of one vector file.
            vectors: float16 (N, D); rows after the indexed ones are allowed.
        """
        try:
            about = json.loads(read_file(folder / ABOUT))
            with (folder / FILE).open("rb") as stream:
                return cls._read(stream, about, vectors)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    @classmethod
    def build(
        cls, vectors: Array, folder: Path, queries_sample: Array, *, recall: float = 0.98
    ) -> AnnIndex:
        """Build the index of a vector file, write it atomically, and return it.

        It takes minutes for a million rows on two cores, and up to twice the memory of its codes;
        an index in use is not disturbed.

        Args:
            vectors: float16 (N, D), unit vectors; rows of zeros, and rows that are not finite, are
                not indexed.
            folder: the cache of one vector file; made if missing.
            queries_sample: (S, D), unit vectors, of the kind that will be searched for: texts, not
                images. A few hundred.
            recall: the share of the 10 best rows that the sample finds at least.

        Raises:
            UsageError: there is no vector or no query, a query does not fit, or no faiss.
            CNClipError: the folder is not writable, or the disk is full.
        """
        faiss = load_faiss()
        if faiss is None:
            raise UsageError(_("an index needs faiss, on Linux: pip install faiss-cpu"))
        vectors = vectors.view(np.ndarray)
        queries = checked_search(vectors, queries_sample, _TUNED_K)
        members = _indexed_rows(vectors)
        if not len(members) or not len(queries):
            raise UsageError(
                _(
                    "an index needs vectors and sample queries; there are {members} and {queries}",
                    members=len(members),
                    queries=len(queries),
                )
            )
        with map_write_errors(folder / FILE), atomic_file(folder / FILE) as temporary:
            index = _filled(faiss, vectors, members)
            about = {
                FIELD: str(FORMAT),
                "faiss": faiss.__version__,
                "rows": len(vectors),
                "members": len(members),
                "dim": vectors.shape[1],
                "lists": index.nlist,
                "probes": _probes(vectors, queries, index, recall),
                "recall": recall,
                "vectors": _vectors_digest(vectors),
            }
            with temporary.open("w+b") as stream:
                faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))
                del index
                stream.flush()
                about["index"] = _index_digest(stream, about["members"], about["dim"])
                opened = cls._read(stream, about, vectors)
            assert opened is not None, "an index just written is valid"
        write_text(folder / ABOUT, json.dumps(about))
        return opened

    @classmethod
    def _read(cls, stream: BinaryIO, about: dict[str, Any], vectors: Array) -> AnnIndex | None:
        """Return the index in a file, if it is as described and of these vectors.

        Raises:
            OSError, ValueError, KeyError, TypeError: the description is not one, or the file fails.
        """
        names = ("rows", "members", "dim", "lists", "probes")
        rows, members, dim, lists, probes = (_count(about[name]) for name in names)
        if about[FIELD] != str(FORMAT) or dim != vectors.shape[1]:
            return None
        if not (members <= rows <= len(vectors) and lists <= members and probes <= lists):
            return None
        vectors = vectors.view(np.ndarray)
        if about["vectors"] != _vectors_digest(vectors[:rows]):
            return None
        if about["index"] != _index_digest(stream, members, dim):
            return None
        faiss = load_faiss()
        if faiss is None or about["faiss"] != faiss.__version__:
            return None
        try:
            # By its number: the file that was checked, and no name that must be UTF-8.
            index = faiss.read_index(f"/proc/self/fd/{stream.fileno()}", faiss.IO_FLAG_MMAP)
        except RuntimeError:  # all that faiss raises
            return None
        if (index.d, index.ntotal, index.nlist) != (dim, members, lists):
            return None
        # By default a search starts 32 threads to read its cells.
        faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
        return cls(vectors, rows, lists, probes, index)

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
        count = self.rows if allowed is None else int(np.count_nonzero(allowed[: self.rows]))
        if count <= max(_EXACT_SHARE * self.rows, _CANDIDATES * k):
            return search_exact(self.vectors, queries, k, allowed=allowed, threads=threads)
        with openmp_threads(threads if len(queries) > 1 else 1):
            found = self._candidates(queries, k, allowed, count)
        result, _invalid = best_of(self.vectors, queries, found, k)
        if result.indexes.shape[1] < k:  # too many rows were purged since the index was built
            return search_exact(self.vectors, queries, k, allowed=allowed, threads=threads)
        tail = self.vectors[self.rows :]
        if not len(tail):
            return result
        rest = None if allowed is None else allowed[self.rows :]
        newer = search_exact(tail, queries, k, allowed=rest, threads=threads)
        return _merged(result, TopK(newer.indexes + self.rows, newer.scores), k)

    def _candidates(self, queries: Array, k: int, allowed: Mask | None, count: int) -> list[Rows]:
        """Return for each query the rows of the nearest cells whose codes score best.

        Args:
            queries, k, allowed: of the search.
            count: of the indexed rows that are allowed.
        """
        faiss = load_faiss()
        assert faiss is not None
        wanted = max(_CANDIDATES, 4 * k)
        # More results are in more cells.
        probes = min(self.lists, math.ceil(self.probes * max(1, (k / _TUNED_K) ** 0.5)))
        parameters = faiss.SearchParametersIVF(nprobe=probes)
        pending = np.arange(len(queries))
        ids = np.full((len(queries), wanted), -1, np.int64)  # best first
        if allowed is None or count >= _MOSTLY * self.rows:
            # A few images are hidden in most libraries: where they are not near to a query, its
            # nearest cells hold as much of the best as without a filter.
            ids = self.index.search(queries, wanted, params=parameters)[1]
            ids[(ids < 0) | (ids >= self.rows)] = -1  # of a damaged file
            if allowed is None:
                return [np.unique(row[row >= 0]) for row in ids]
            found = (ids >= 0).sum(axis=1)
            ids[~allowed[ids]] = -1
            kept = (ids >= 0).sum(axis=1)
            pending = np.flatnonzero((kept < k) | (kept < _MOSTLY * found))
        if len(pending):
            ids[pending] = self._filtered(queries[pending], k, wanted, probes, allowed)
        return [np.unique(row[(row >= 0) & (row < self.rows)]) for row in ids]

    def _filtered(self, queries: Array, k: int, wanted: int, probes: int, allowed: Mask) -> Rows:
        """Return for each query the best ``wanted`` allowed rows, (Q, wanted), best first.

        A filter may leave little in the nearest cells: on, until twice as many add nothing.
        """
        faiss = load_faiss()
        assert faiss is not None
        parameters = faiss.SearchParametersIVF(nprobe=probes)
        bits = np.packbits(allowed[: self.rows], bitorder="little")
        parameters.sel = faiss.IDSelectorBitmap(bits)
        ids: Rows = self.index.search(queries, wanted, params=parameters)[1]
        pending = np.arange(len(queries))
        while len(pending) and parameters.nprobe < self.lists:
            parameters.nprobe = min(self.lists, 2 * parameters.nprobe)
            more = self.index.search(queries[pending], wanted, params=parameters)[1]
            changed = (more[:, :k] != ids[pending, :k]).any(axis=1) | (more[:, -1] < 0)
            ids[pending] = more
            pending = pending[changed]
        return ids


@contextmanager
def openmp_threads(threads: int | None) -> Iterator[None]:
    """Set how many threads faiss uses in this thread; by default one per usable CPU."""
    faiss = load_faiss()
    assert faiss is not None
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(usable_cpus() if threads is None else threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _indexed_rows(vectors: Array) -> Rows:
    """Return the rows that are finite and not all zeros."""
    found = [np.empty(0, np.int64)]
    for at in range(0, len(vectors), _BLOCK):
        block = vectors[at : at + _BLOCK]
        found.append(np.flatnonzero(block.any(axis=1) & np.isfinite(block).all(axis=1)) + at)
    return np.concatenate(found)


def _filled(faiss: Any, vectors: Array, members: Rows) -> Any:
    """Return faiss's index of some rows of the vectors."""
    lists = max(1, min(len(members), round(2 * math.sqrt(len(members)))))
    index = faiss.index_factory(
        vectors.shape[1], f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT
    )  # its k-means is spherical
    index.cp.min_points_per_centroid = 1  # no message on stderr
    sample = np.random.default_rng(0).permutation(members)[: _TRAINED * lists]
    with openmp_threads(None):
        index.train(float32_of(vectors[np.sort(sample)]))
        for at in range(0, len(members), _BLOCK):
            rows = members[at : at + _BLOCK]
            index.add_with_ids(float32_of(vectors[rows]), rows)
    return index


def _probes(vectors: Array, queries: Array, index: Any, recall: float) -> int:
    """Return the number of cells in which the queries find their best rows: the share found, less
    two standard errors, is at least ``recall``."""
    best = search_exact(vectors, queries, _TUNED_K).indexes  # (Q, k)
    order = index.quantizer.search(queries, index.nlist)[1]  # (Q, L), nearest first
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(index.nlist)[None], axis=1)
    cells = index.quantizer.search(float32_of(vectors[best.ravel()]), 1)[1].reshape(best.shape)
    needed = np.take_along_axis(ranks, cells, axis=1)  # (Q, k): probes before it is found

    def is_enough(probes: int) -> bool:
        found = (needed < probes).mean(axis=1)
        return bool(found.mean() - 2 * found.std() / math.sqrt(len(found)) >= recall)

    choices = range(1, index.nlist)
    return choices[0] + bisect.bisect_left(choices, True, key=is_enough) if choices else 1


def _count(value: Any) -> int:
    """Return a number from a description.

    Raises:
        ValueError: it is not a positive integer below 2^31.
    """
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError(value)
    return value


def _vectors_digest(vectors: Array) -> str:
    """Return a checksum of a sample of the rows."""
    sample = np.unique(np.linspace(0, len(vectors) - 1, _SAMPLE).astype(np.int64))
    return hashlib.blake2b(vectors[sample].tobytes(), digest_size=16).hexdigest()


def _index_digest(stream: BinaryIO, members: int, dim: int) -> str:
    """Return a checksum of an index file: its size, all before its codes, and samples of those."""
    size = stream.seek(0, 2)
    start = max(0, size - members * (dim + 8))  # a code and an id of 64 bits per row
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    stream.seek(0)
    digest.update(stream.read(start))
    for at in np.linspace(start, max(start, size - _SAMPLE_BYTES), _SAMPLE).astype(int).tolist():
        stream.seek(at)
        digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _merged(first: TopK, second: TopK, k: int) -> TopK:
    """Return the k best of two results; rows of the first are lower."""
    indexes = np.concatenate([first.indexes, second.indexes], axis=1)
    scores = np.concatenate([first.scores, second.scores], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return TopK(
        np.take_along_axis(indexes, order, axis=1), np.take_along_axis(scores, order, axis=1)
    )

"""What all parts of an index share: centroids, codes, and the texts that it is tuned for.

It is trained once, on a sample of the rows, and kept when shards are added. A row belongs to the
list of its nearest centroid, and is stored there as a code of its difference from it (faiss's
``IVF{lists},SQ4`` and others; Douze et al., The Faiss library, arXiv:2401.08281). Only faiss knows
the codes; which centroid is nearest, here and in k-means, is computed in int8 if numkong is
installed, several times faster: a row in the second-nearest list is found as well, because lists
are counted as they are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cn_clip.arrays import read_npy
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.files import read_file
from cn_clip.format_version import FIELD, Format
from cn_clip.outputs import atomic_folder
from cn_clip.processes import usable_cpus
from cn_clip.publish import map_write_errors
from cn_clip.search.ann import load_faiss, openmp_threads
from cn_clip.search.codes import encode
from cn_clip.search.confidence import SAMPLE
from cn_clip.search.kernels import float32_of, has_numkong, products_with
from cn_clip.shards.folder import ShardFolder
from cn_clip.text import path_text
from cn_clip.topk import checked_vectors
from cn_clip.translation import _

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Lists = npt.NDArray[np.int64]

Nearest = Callable[[npt.NDArray[np.int8]], Lists]
CodeName = Literal["int8", "int4", "pq"]

FORMAT = Format("shard index training", 1)
TRAINED = "trained"
_INDEX, _QUERIES, _SAMPLE, _ABOUT = "centroids.faiss", "queries.npy", "sample.npy", "trained.json"
_TUNED_FOR = 256  # texts
_PER_LIST = 32  # rows that a centroid is fitted to
_ROUNDS = 8  # of k-means
_MAX_SAMPLE = 1 << 20  # rows
_READ_TOGETHER = 64  # neighbouring rows of the sample, which cost one read of the disk
_ASSIGNED = 1 << 10  # rows compared with all centroids at once
_PQ_DIMS = 4  # dimensions per byte
_INT8_MAX = 127


@dataclass(frozen=True)
class Trained:
    """A trained index without rows.

    Attributes:
        index: faiss's.
        queries: float32 (Q, D), texts that the index is tuned for.
        sample: float16 (S, D), random rows, from which the confidence of results is estimated.
        digest: of index and queries; parts of another training do not fit.
        sampled_of: number of rows when it was trained.
        codes: that were asked for.
        asked_lists: that were asked for, if any were; the index has fewer if rows are few.
    """

    index: Any
    queries: Floats
    sample: Array
    digest: str
    sampled_of: int
    codes: CodeName
    asked_lists: int | None

    @classmethod
    def open(cls, folder: Path) -> Trained | None:
        """Return what was trained in the folder of an index; None without it, or if damaged.

        The file is read by C++ that is not made for files of others, so its checksum is compared
        first. A checksum is no signature: the folder must be the user's own.
        """
        faiss = load_faiss()
        try:
            about = json.loads(read_file(folder / TRAINED / _ABOUT))
            FORMAT.check(about[FIELD], folder / TRAINED / _ABOUT, DataError, _("build it again"))
            content = read_file(folder / TRAINED / _INDEX)
            queries = read_npy(folder / TRAINED / _QUERIES)
            if faiss is None or _digest(content, queries) != about["digest"]:
                return None
            index = faiss.deserialize_index(np.frombuffer(content, np.uint8))
            sample = read_npy(folder / TRAINED / _SAMPLE)
            if index.d != queries.shape[1] or sample.shape[1:] != queries.shape[1:]:
                return None
            return cls(
                index,
                queries,
                sample,
                about["digest"],
                int(about["rows"]),
                about["codes"],
                about.get("asked_lists"),
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError, CNClipError):
            return None
        except RuntimeError:  # all that faiss raises: of another version
            return None

    @cached_property
    def _nearest(self) -> Nearest:
        return nearest_of(self.index.quantizer.reconstruct_n(0, self.index.nlist))

    def lists_of(self, vectors: Floats) -> Lists:
        """Return the list (N,) of each unit vector (N, D)."""
        if has_numkong():
            return self._nearest(encode(vectors)[0])
        nearest: Lists = self.index.quantizer.search(vectors, 1)[1][:, 0]
        return nearest

    def encode(self, vectors: Floats, lists: Lists) -> npt.NDArray[np.uint8]:
        """Return the codes (N, B) of vectors (N, D) in their lists (N,)."""
        faiss = load_faiss()
        assert faiss is not None
        codes = np.zeros((len(vectors), self.index.code_size), np.uint8)
        vectors, lists = np.ascontiguousarray(vectors), np.ascontiguousarray(lists)
        pointers = map(faiss.swig_ptr, (vectors, lists, codes))
        self.index.encode_vectors(len(vectors), *pointers)
        return codes


def train(
    folder: ShardFolder,
    rows: list[int],
    out: Path,
    queries: Array,
    *,
    codes: CodeName,
    lists: int | None = None,
) -> Trained:
    """Train an index on a sample, and write it.

    Args:
        folder: the shards.
        rows: the number of rows of each shard, in order.
        out: the folder of the index.
        queries: unit vectors (Q, D) of texts such as will be searched for; a few hundred of them
            are used.
        codes: ``int8`` takes D bytes for a row, ``int4`` half, ``pq`` a quarter.
        lists: their number; by default twice the root of the number of rows.

    Raises:
        UsageError: there is no faiss, or no vector, or the width does not fit the codes.
        CNClipError: the disk is full or read-only.
    """
    faiss = load_faiss()
    if faiss is None:
        raise UsageError(_("an index needs faiss, on Linux: pip install faiss-cpu"))
    queries = checked_vectors(queries, "queries").astype(np.float32, copy=False)
    queries = np.ascontiguousarray(_some(queries, _TUNED_FOR))
    dim, total = folder.dim, sum(rows)
    if queries.shape[1] != dim or not len(queries):
        raise UsageError(
            _(
                "the texts that tune the index have {width} values, and the shards {dim}; give the "
                "model of the shards",
                width=queries.shape[1],
                dim=dim,
            )
        )
    if codes == "pq" and dim % _PQ_DIMS:
        raise UsageError(
            _("--codes pq needs a width that 4 divides, not {dim}; give int4", dim=dim)
        )
    count = lists or max(1, round(2 * math.sqrt(total)))
    sample = sample_rows(folder, rows, min(_PER_LIST * count, _MAX_SAMPLE))
    count = min(count, len(sample))
    if not count:
        raise UsageError(_("{path} holds no vectors to index", path=path_text(folder.path)))
    kind = {"int8": "SQ8", "int4": "SQ4", "pq": f"PQ{dim // _PQ_DIMS}"}[codes]
    if codes == "pq" and len(sample) < 1 << 8:  # faiss fits 256 centroids in each subspace
        kind = "SQ8"
    index = faiss.index_factory(dim, f"IVF{count},{kind}", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # no message on stderr
    index.cp.niter = _ROUNDS
    index.cp.max_points_per_centroid = 1 << 20  # all that was sampled
    if has_numkong():
        index.quantizer.add(fitted_centroids(sample, count))  # faiss then trains the codes alone
    if codes == "pq" and kind != "SQ8":
        index.pq.cp.min_points_per_centroid = 1
    with openmp_threads(usable_cpus()):
        index.train(sample)
    content = faiss.serialize_index(index).tobytes()
    digest, kept = _digest(content, queries), _some(sample, SAMPLE).astype(np.float16)
    about = {
        FIELD: str(FORMAT),
        "faiss": faiss.__version__,
        "digest": digest,
        "rows": total,
        "sample": len(sample),
        "lists": count,
        "asked_lists": lists,
        "codes": codes,
        "code_bytes": index.code_size,
    }
    with map_write_errors(out), atomic_folder(out / TRAINED, "bulk index") as temporary:
        (temporary / _INDEX).write_bytes(content)
        np.save(temporary / _QUERIES, queries)
        np.save(temporary / _SAMPLE, kept)
        (temporary / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
    return Trained(index, queries, kept, digest, total, codes, lists)


def nearest_of(centroids: Floats) -> Nearest:
    """Return a function from int8 codes (N, D) of unit vectors to their nearest centroids (N,)."""
    # One scale for all, so that products compare as they are.
    step = max(float(np.abs(centroids).max()), 1e-12) / _INT8_MAX
    multiply = products_with(np.rint(centroids / step).astype(np.int8))

    def nearest(codes: npt.NDArray[np.int8]) -> Lists:
        found = [
            multiply(codes[at : at + _ASSIGNED]).argmax(axis=1)
            for at in range(0, len(codes), _ASSIGNED)
        ]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    return nearest


def fitted_centroids(sample: Floats, count: int) -> Floats:
    """Return centroids, unit vectors (count, D), by spherical k-means; that of an empty cluster
    becomes a random row."""
    rng = np.random.default_rng(0)
    centroids = sample[np.sort(rng.permutation(len(sample))[:count])]
    codes, _scales = encode(sample)
    for _round in range(_ROUNDS):
        lists = nearest_of(centroids)(codes)
        order = np.argsort(lists, kind="stable")
        used, starts = np.unique(lists[order], return_index=True)
        centroids = sample[rng.integers(len(sample), size=count)]
        centroids[used] = np.add.reduceat(sample[order], starts, axis=0)
        lengths = np.linalg.norm(centroids, axis=1, keepdims=True)
        centroids /= np.maximum(lengths, 1e-12)
    return centroids


def sample_rows(folder: ShardFolder, rows: list[int], wanted: int) -> Floats:
    """Return vectors (S, D) of random rows, in runs of neighbours, the same ones each time. Rows of
    zeros, and rows that are not finite, are left out."""
    total = sum(rows)
    runs = np.arange(0, total, _READ_TOGETHER)
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.permutation(len(runs))[: -(-wanted // _READ_TOGETHER)])
    ends = np.cumsum(rows)
    found = [np.empty((0, folder.dim), np.float32)]
    for number, (shard, end) in enumerate(zip(folder.numbers, ends.tolist(), strict=True)):
        first = end - rows[number]
        inside = runs[chosen[(runs[chosen] >= first) & (runs[chosen] < end)]] - first
        if not len(inside):
            continue
        vectors = folder.vectors(shard)
        for at in inside.tolist():
            stored = vectors[at : at + _READ_TOGETHER]
            found.append(float32_of(stored[has_direction(stored)]))
    return np.concatenate(found)[:wanted]


def has_direction(stored: Array) -> npt.NDArray[np.bool_]:
    """Return which rows (N,) are finite and not all zeros."""
    return np.asarray(np.isfinite(stored).all(axis=1) & stored.any(axis=1))


def _some(rows: Floats, count: int) -> Floats:
    """Return at most ``count`` random rows, the same ones each time."""
    return rows[np.sort(np.random.default_rng(0).permutation(len(rows))[:count])]


def _digest(content: bytes, queries: Array) -> str:
    digest = hashlib.blake2b(content, digest_size=16)
    digest.update(np.ascontiguousarray(queries, np.float32).tobytes())
    return digest.hexdigest()

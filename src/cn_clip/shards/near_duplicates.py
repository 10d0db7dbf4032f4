"""Near-duplicate images over shards, found by their embeddings in the lists of an index.

An image is removed if one with a lower id is nearly the same: what is removed depends on neither
the order of the work nor the number of processes, and the first image of each group is kept. As in
SemDeDup (Abbas et al., arXiv:2303.09540), images are compared within their cluster, here a list of
the index and its nearest lists; the codes there find candidates, and the vectors decide.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.data.curate.perceptual_hash import hash_image, look_alike, read_for_hash
from cn_clip.data.process_map import Progress, Workers, at_most, no_progress, parallel_map
from cn_clip.data.ray_cluster import Cluster
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.publish import map_write_errors
from cn_clip.search.ann import load_faiss, openmp_threads
from cn_clip.shards.folder import Rows, ShardFolder
from cn_clip.shards.index import ShardIndex
from cn_clip.shards.kept import Mask, mask_of, write_kept
from cn_clip.shards.metadata import MetadataReader
from cn_clip.text import path_text
from cn_clip.translation import _

Floats = npt.NDArray[np.float32]

THRESHOLD = 0.97
NEIGHBOURS = 2  # nearest lists that a list is compared with
_MARGIN = {1: 0.01, 2: 0.04, 4: 0.12}  # by which codes may be wrong: D / bytes of a code
_CANDIDATES = 4  # lower images that are compared exactly with each; all, if images are looked at
_BLOCK = 1 << 10  # rows compared with a list at once
_DECODED = 32  # lists kept in memory
_JOB_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class Deduplicated:
    """What was kept.

    Attributes:
        images: compared.
        kept: of them.
        removed: int64 (N, 2): images that were removed, and a lower one that each is like.
    """

    images: int
    kept: int
    removed: npt.NDArray[np.int64]


def remove_duplicates(
    path: Path,
    out: Path,
    *,
    threshold: float = THRESHOLD,
    look: bool = False,
    within: Rows | None = None,
    workers: Workers = 0,
    on_progress: Progress = no_progress,
) -> Deduplicated:
    """Write the list of the images that are kept.

    Args:
        path: of a folder with an index of all its shards.
        out: from ``claim_kept``.
        threshold: least cosine of near-duplicates.
        look: also read the files of candidates, and compare their perceptual hashes; images whose
            files cannot be read are kept.
        within: ids (N,), sorted, of the images that are considered; None for all.
        workers: that compare; 0 compares in this process.
        on_progress: called with the number of images so far and in total.

    Raises:
        UsageError: there is no index, or not of all shards; or the threshold is out of range.
        DataError: a shard is damaged, or a worker died.
        CNClipError: the disk is full.
    """
    if not 0 < threshold <= 1:
        raise UsageError(
            _("the threshold is {threshold}; give a cosine up to 1", threshold=threshold)
        )
    index = ShardIndex.open(path)
    if index.lists is None or index.unindexed:
        raise UsageError(
            _(
                "duplicates are found in the lists of an index of all shards; run: cn-clip bulk "
                "index {path}",
                path=path_text(path),
            )
        )
    sizes = _sizes(index)
    jobs = _jobs(sizes)
    total, done, found = int(sizes.sum()), 0, [np.empty((0, 2), np.int64)]
    with (
        _shared(within, workers) as considered,
        parallel_map(
            CompareLists(path, threshold, look, considered), at_most(workers, len(jobs))
        ) as run,
    ):
        for job, pairs in zip(jobs, run(jobs), strict=True):
            found.append(pairs)
            done += int(sizes[job.start : job.stop].sum())
            on_progress(done, total)
    removed = np.concatenate(found)
    removed = removed[np.argsort(removed[:, 0], kind="stable")]
    kept = write_kept(index.folder, out, _masks(index.folder, removed[:, 0], within))
    return Deduplicated(total if within is None else len(within), kept, removed)


@contextmanager
def _shared(within: Rows | None, workers: Workers) -> Iterator[Rows | Path | None]:
    """Yield ids in a form that workers share, as each would else have a copy of them.

    Processes map a file; Ray shares an array on each machine by itself.
    """
    if within is None or isinstance(workers, Cluster):
        yield within
        return
    with tempfile.TemporaryDirectory(prefix="cn-clip-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "within.npy"  # Windows keeps it while it is mapped
        with map_write_errors(path):
            np.save(path, within)
        yield path


@dataclass(frozen=True)
class CompareLists:
    """Finds near-duplicates among the rows of some lists, in any process.

    Attributes:
        path: of the folder.
        threshold: least cosine.
        look: whether the images must look alike too.
        within: ids (N,), sorted, of the images that are considered, or their file; None for all.
    """

    path: Path
    threshold: float
    look: bool
    within: Rows | Path | None

    @cached_property
    def _index(self) -> ShardIndex:
        """The index, opened once in each process."""
        return ShardIndex.open(self.path)

    @cached_property
    def _considered(self) -> Rows | None:
        if isinstance(self.within, Path):
            return np.load(self.within, mmap_mode="r")  # type: ignore[no-any-return]
        return self.within

    def __call__(self, lists: range) -> npt.NDArray[np.int64]:
        """Return images (N,) of the lists and a lower one that each is like, int64 (N, 2).

        Raises:
            DataError: a shard is damaged, or the index has changed.
        """
        index = self._index
        if index.lists is None:
            raise DataError(_("the index of {path} has changed", path=path_text(self.path)))
        decoded = _Decoded(index, self._considered)
        hashes = _Hashes(index)
        found = [np.empty((0, 2), np.int64)]
        with openmp_threads(1):
            neighbours = _neighbours(index.lists.index, lists)
            for number in lists:
                others = neighbours[number - lists.start]
                if self.look:
                    found.append(self._looking_alike(decoded, hashes, number, others))
                else:
                    pairs = self._candidates(decoded, number, others)
                    found.append(self._verified(index, pairs))
        return np.concatenate(found)

    def _looking_alike(
        self, decoded: _Decoded, hashes: _Hashes, number: int, others: Rows
    ) -> npt.NDArray[np.int64]:
        """Return for each image of a list the nearest lower one that is near enough and looks
        alike, int64 (N, 2). All that are near enough are looked at."""
        ids, rows = decoded[number]
        best = np.full(len(ids), -1, np.int64)
        scores = np.full(len(ids), -np.inf, np.float32)
        for other in (number, *others.tolist()):
            for at in range(0, len(ids), _BLOCK):
                part = slice(at, at + _BLOCK)
                own, lower, cosines = self._near(decoded, ids[part], rows[part], other)
                hashes.read(np.union1d(ids[part][own], lower))
                for row, each in zip((own + at).tolist(), cosines, strict=True):
                    alike = np.flatnonzero(each >= self._least)
                    alike = alike[hashes.alike(int(ids[row]), lower[alike])]
                    if not len(alike):
                        continue
                    nearest = alike[np.lexsort((lower[alike], -each[alike]))[0]]
                    if (each[nearest], -lower[nearest]) > (scores[row], -best[row]):
                        scores[row], best[row] = each[nearest], lower[nearest]
        chosen = best >= 0
        return np.stack([ids[chosen], best[chosen]], axis=1)

    def _near(
        self, decoded: _Decoded, ids: Rows, rows: Floats, other: int
    ) -> tuple[Rows, Rows, Floats]:
        """Return the rows (N,) that have lower images in a list whose vectors are near enough,
        these images (M,), and the cosines (N, M); that of an image that is not lower is -inf."""
        other_ids, other_rows = decoded[other]
        lower = other_ids[None] < ids[:, None]
        near = lower & (rows @ other_rows.T >= self.threshold - decoded.margin)
        own, theirs = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
        cosines = _exact(self._index, ids[own]) @ _exact(self._index, other_ids[theirs]).T
        cosines[~lower[np.ix_(own, theirs)]] = -np.inf
        near = cosines >= self._least
        kept, columns = near.any(axis=1), near.any(axis=0)
        return own[kept], other_ids[theirs[columns]], cosines[np.ix_(kept, columns)]

    @property
    def _least(self) -> np.float32:
        return np.float32(self.threshold) - np.float32(1e-6)

    def _candidates(self, decoded: _Decoded, number: int, others: Rows) -> npt.NDArray[np.int64]:
        """Return pairs (N, 2) of an image and a lower one whose codes are near, by image."""
        ids, rows = decoded[number]
        limit = self.threshold - decoded.margin
        best = np.full((len(ids), _CANDIDATES), -1, np.int64)
        scores = np.full((len(ids), _CANDIDATES), -np.inf, np.float32)
        for other in (number, *others.tolist()):
            other_ids, other_rows = decoded[other]
            for at in range(0, len(ids), _BLOCK):
                part = slice(at, at + _BLOCK)
                products = rows[part] @ other_rows.T
                products[other_ids[None] >= ids[part, None]] = -np.inf
                near = np.flatnonzero((products >= limit).any(axis=1))
                if not len(near):
                    continue
                width = min(_CANDIDATES, len(other_ids))
                top = np.argpartition(products[near], -width, axis=1)[:, -width:]
                _keep_best(
                    best, scores, near + at, other_ids[top],
                    np.take_along_axis(products[near], top, axis=1),
                )  # fmt: skip
        row, column = np.nonzero(scores >= limit)
        return np.stack([ids[row], best[row, column]], axis=1)

    def _verified(self, index: ShardIndex, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return one pair for each image that is near enough to a lower one: the nearest."""
        if not len(pairs):
            return pairs
        ids, places = np.unique(pairs, return_inverse=True)
        vectors = _exact(index, ids)
        first, second = places.reshape(pairs.shape).T
        cosines = (vectors[first] * vectors[second]).sum(axis=1)
        near = cosines >= self._least
        pairs, cosines = pairs[near], cosines[near]
        order = np.lexsort((pairs[:, 1], -cosines, pairs[:, 0]))
        pairs = pairs[order]
        return pairs[np.flatnonzero(np.diff(pairs[:, 0], prepend=-1))]


class _Decoded:
    """The ids (N,) and vectors (N, D) of lists, decoded from their codes; the last ones are kept.

    Attributes:
        margin: by which a product of two vectors may be wrong.
    """

    def __init__(self, index: ShardIndex, within: Rows | None) -> None:
        faiss = load_faiss()
        assert faiss is not None and index.lists is not None
        self._faiss, self._index = faiss, index.lists.index
        self._within = within
        self._cache: OrderedDict[int, tuple[Rows, Floats]] = OrderedDict()
        ratio = max(1, self._index.d // self._index.code_size)
        self.margin = _MARGIN[min((1, 2, 4), key=lambda each: abs(each - ratio))]

    def __getitem__(self, number: int) -> tuple[Rows, Floats]:
        found = self._cache.pop(number, None) or self._decode(number)
        self._cache[number] = found
        while len(self._cache) > _DECODED:
            self._cache.popitem(last=False)
        return found

    def _decode(self, number: int) -> tuple[Rows, Floats]:
        lists, index = self._index.invlists, self._index
        size = lists.list_size(number)
        if not size:
            return np.empty(0, np.int64), np.empty((0, index.d), np.float32)
        ids = self._faiss.rev_swig_ptr(lists.get_ids(number), size).copy()
        codes = self._faiss.rev_swig_ptr(lists.get_codes(number), size * index.code_size)
        head = index.coarse_code_size()
        full = np.empty((size, head + index.code_size), np.uint8)
        full[:, :head] = np.frombuffer(number.to_bytes(head, "little"), np.uint8)
        full[:, head:] = codes.reshape(size, index.code_size)
        if self._within is not None:
            considered = _is_in(ids, self._within)
            ids, full = ids[considered], full[considered]
        return ids, index.sa_decode(full)


def _exact(index: ShardIndex, ids: Rows) -> Floats:
    """Return the unit vectors (N, D) of ids (N,)."""
    order = np.argsort(ids)
    vectors = np.empty((len(ids), index.folder.dim), np.float32)
    vectors[order] = index.reader.read(ids[order])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def _is_in(ids: Rows, sorted_ids: Rows) -> npt.NDArray[np.bool_]:
    """Return which ids (N,) are among sorted ones, of which few are read."""
    places = np.searchsorted(sorted_ids, ids)
    inside = places < len(sorted_ids)
    inside[inside] = sorted_ids[places[inside]] == ids[inside]
    return inside


def _keep_best(best: Rows, scores: Floats, rows: Rows, more: Rows, more_scores: Floats) -> None:
    """Keep the best of what is known of rows and of what was found now."""
    ids = np.concatenate([best[rows], more], axis=1)
    values = np.concatenate([scores[rows], more_scores], axis=1)
    order = np.argsort(-values, axis=1, kind="stable")[:, : best.shape[1]]
    best[rows] = np.take_along_axis(ids, order, axis=1)
    scores[rows] = np.take_along_axis(values, order, axis=1)


def _neighbours(index: Any, lists: range) -> list[Rows]:
    """Return for each list those that it is near to, or that are near to it."""
    centroids = index.quantizer.reconstruct_n(0, index.nlist)
    width = min(NEIGHBOURS + 1, index.nlist)
    nearest = index.quantizer.search(centroids, width)[1]  # (L, width), itself included
    own = np.arange(index.nlist)
    found = []
    for number in lists:
        near_to_it = own[(nearest == number).any(axis=1)]
        every = np.union1d(nearest[number], near_to_it)
        found.append(every[(every != number) & (every >= 0)])
    return found


def _sizes(index: ShardIndex) -> npt.NDArray[np.int64]:
    assert index.lists is not None
    lists = index.lists.index.invlists
    return np.array([lists.list_size(n) for n in range(index.lists.index.nlist)], np.int64)


def _jobs(sizes: npt.NDArray[np.int64]) -> list[range]:
    """Split the lists into ranges of about ``_JOB_ROWS`` rows."""
    jobs, first, rows = [], 0, 0
    for number, size in enumerate(sizes.tolist()):
        rows += size
        if rows >= _JOB_ROWS:
            jobs.append(range(first, number + 1))
            first, rows = number + 1, 0
    return [*jobs, range(first, len(sizes))] if first < len(sizes) else jobs


def _masks(folder: ShardFolder, removed: Rows, within: Rows | None) -> Iterator[tuple[int, Mask]]:
    """Yield which rows of each shard are kept."""
    for shard in folder.numbers:
        count = len(folder.vectors(shard))
        yield shard, mask_of(shard, count, within) & ~mask_of(shard, count, removed)


class _Hashes:
    """The perceptual hashes of images, each read once."""

    def __init__(self, index: ShardIndex) -> None:
        self._metadata = MetadataReader(index.folder)
        self._known: dict[int, Any] = {}

    def read(self, images: Rows) -> None:
        """Read the hashes of images (N,), unless they are known."""
        unknown = [image for image in images.tolist() if image not in self._known]
        facts = self._metadata.read(unknown)
        for image in unknown:
            self._known[image] = _look_of(facts[image].path) if image in facts else None

    def alike(self, image: int, others: Rows) -> npt.NDArray[np.bool_]:
        """Return which images (N,), read before, look like one; not one that is unreadable."""
        own, hashes = self._known[image], [self._known[other] for other in others.tolist()]
        alike = np.array([own is not None and each is not None for each in hashes], np.bool_)
        if alike.any():
            alike[alike] = look_alike(np.stack([each for each in hashes if each is not None]), own)
        return alike


def _look_of(path: str) -> Any:
    """Return the perceptual hash of an image; None if it cannot be read."""
    try:
        return hash_image(read_for_hash(path))
    except (CNClipError, OSError, ValueError):
        return None

"""An index of embedding shards: lists of codes, mapped, and exact scores from the shards."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.search.ann import load_faiss, openmp_threads
from cn_clip.search.exact import best_of, checked_search, joined, search_exact
from cn_clip.shards.encoding import TUNED_K
from cn_clip.shards.folder import SPAN, ShardFolder, ids_of
from cn_clip.shards.lists import Lists
from cn_clip.shards.row_reader import RowReader
from cn_clip.shards.training import Trained, has_direction
from cn_clip.topk import TopK, top_k

Array = npt.NDArray[Any]

INDEX = "index"
_GROWTH = 0.1  # of the rows: after as many new ones, an index is worth building again


def lists_folder(index: Path, shards: range | None) -> Path:
    """Return the folder of the lists of a range of shards; of all for None."""
    name = "all" if shards is None else f"{shards.start:05d}-{shards.stop:05d}"
    return index / f"lists-{name}"


@dataclass(frozen=True)
class ShardIndex:
    """Search of a folder of shards, by an index where there is one, else exactly.

    Attributes:
        whole: all shards of the folder.
        folder: the shards that are searched.
        trained: what their index shares with those of other ranges; None without one.
        lists: an index of some of them; None without one.
        reader: of the vectors of all shards of the folder.
    """

    whole: ShardFolder
    folder: ShardFolder
    trained: Trained | None
    lists: Lists | None
    reader: RowReader = field(repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def open(cls, path: Path, shards: range | None = None) -> ShardIndex:
        """Open a folder, or a range of its shards. An index of the range is preferred to one of the
        whole folder.

        Raises:
            UsageError: there is no finished shard.
            DataError: the folder is damaged.
        """
        whole = ShardFolder.open(path)
        folder = whole if shards is None else ShardFolder.open(path, shards)
        trained = Trained.open(path / INDEX) if load_faiss() is not None else None
        found = None
        if trained is not None:
            ranges = [None] if shards is None else [shards, None]
            opened = (Lists.open(lists_folder(path / INDEX, each), trained) for each in ranges)
            found = next((lists for lists in opened if lists is not None), None)
        return cls(whole, folder, trained, found, RowReader(whole))

    def __len__(self) -> int:
        """Number of vectors that are searched."""
        return sum(self.rows_of(self.folder))

    def rows_of(self, folder: ShardFolder) -> list[int]:
        """Return the number of vectors of each shard; those in the index are not opened."""
        known: dict[int, int] = {} if self.lists is None else dict(self.lists.shards.tolist())
        return [
            known[shard] if shard in known else len(folder.vectors(shard))
            for shard in folder.numbers
        ]

    @property
    def is_outgrown(self) -> bool:
        """Whether there is no index, or so much was added that building it again pays."""
        indexed = 0 if self.lists is None else int(self.lists.shards[:, 1].sum())
        return sum(len(self.folder.vectors(n)) for n in self.unindexed) > _GROWTH * indexed

    @cached_property
    def unindexed(self) -> list[int]:
        """The shards that are searched exactly."""
        known = set() if self.lists is None else set(self.lists.shards[:, 0].tolist())
        return [shard for shard in self.folder.numbers if shard not in known]

    def search(self, queries: Array, k: int, *, threads: int = 1) -> TopK:
        """Return about the k best images for each query; their scores are exact.

        Args:
            queries: unit vectors (Q, D).
            k: results per query; fewer if there are fewer images.
            threads: for the lists of one query, or for several queries.

        Returns:
            Ids int64 (Q, k) and scores float32 (Q, k), best first; ties by id.

        Raises:
            UsageError: k is below 1, or a query does not fit.
            DataError: a shard is missing or damaged.
        """
        queries = checked_search(np.empty((0, self.folder.dim), np.float16), queries, k)
        found = [] if self.lists is None else [self._by_lists(queries, k, threads)]
        found += [self._exactly(shard, queries, k) for shard in self.unindexed]
        return merged(found, k)

    def vector(self, image: int) -> npt.NDArray[np.float32]:
        """Return the vector (D,) of an id; zeros if there is none."""
        if image < 1:
            return np.zeros(self.folder.dim, np.float32)
        vectors = self.reader.read(np.array([image], np.int64))
        return vectors.reshape(-1)

    def _by_lists(self, queries: Array, k: int, threads: int) -> TopK:
        with openmp_threads(threads):
            candidates = self._candidates(queries, k)
        results = []
        for query, ids in zip(queries, candidates, strict=True):
            ids = np.unique(ids[ids > 0])
            rows = self.reader.read(ids)
            best, _zeros = best_of(rows, query[None], [np.arange(len(ids))], k)
            results.append(TopK(ids[best.indexes], best.scores))
        return joined(results, k)

    def _candidates(self, queries: Array, k: int) -> npt.NDArray[np.int64]:
        """Return ids (Q, C) whose codes score best; -1 where there are fewer."""
        faiss = load_faiss()
        assert faiss is not None and self.lists is not None
        about, index = self.lists.about, self.lists.index
        wider = max(1.0, k / TUNED_K)  # more results are in more lists
        probes = min(index.nlist, math.ceil(about["probes"] * wider**0.5))
        wanted = max(math.ceil(about["candidates"] * wider), 4 * k)
        parameters = faiss.SearchParametersIVF(nprobe=probes)
        first, last = self.folder.numbers[0], self.folder.numbers[-1]
        indexed = self.lists.shards[:, 0]
        if indexed[0] < first or indexed[-1] > last:  # an index of the whole folder
            parameters.sel = faiss.IDSelectorRange(first * SPAN + 1, (last + 1) * SPAN + 1)
        return np.asarray(index.search(queries, wanted, params=parameters)[1])

    def _exactly(self, shard: int, queries: Array, k: int) -> TopK:
        vectors = self.folder.vectors(shard)
        if not len(vectors):
            return TopK(np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0)))
        if vectors.dtype == np.float16:
            found = search_exact(vectors, queries, k)
        else:
            good = has_direction(vectors)
            valid = np.flatnonzero(good)
            # Without a copy if all are, as nearly always: the file is mapped.
            found = top_k(queries, vectors if good.all() else vectors[good], min(k, len(valid)))
            found = TopK(valid[found.indexes], found.scores)
        return TopK(ids_of(shard, found.indexes), found.scores)


def merged(results: list[TopK], k: int) -> TopK:
    """Return the k best of several results for the same queries; ties by id."""
    ids = np.concatenate([result.indexes for result in results], axis=1)
    scores = np.concatenate([result.scores for result in results], axis=1).astype(np.float32)
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return TopK(np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1))

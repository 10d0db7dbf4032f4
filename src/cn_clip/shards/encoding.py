"""Parts of an index: the rows of a few shards, coded and sorted by list.

Each part is made by one call that reads its shards and nothing else, so that any number of
processes makes parts at once, and a killed run loses only those that were being made. Part NAME is
``NAME.rows.npy``, an id and a code for each row, and ``NAME.npz``, which is written last: how many
rows each list has, what the part was made of, and its best rows for the texts that the index is
tuned for, found exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.arrays import read_npz
from cn_clip.errors import DataError
from cn_clip.publish import atomic_file, map_write_errors
from cn_clip.search.ann import openmp_threads
from cn_clip.search.kernels import float32_of
from cn_clip.shards.folder import ShardFolder, ids_of
from cn_clip.shards.training import Trained, has_direction
from cn_clip.text import path_text
from cn_clip.translation import _

Array = npt.NDArray[Any]

TUNED_K = 10  # results per query that the recall is measured for
PARTS = "parts"
_PART_ROWS = 1 << 19
_BLOCK = 1 << 14  # rows read at a time
_ARRAYS = ("sizes", "shards", "trained", "best_ids", "best_scores", "best_lists")


@dataclass(frozen=True, slots=True)
class PartPlan:
    """A part to make.

    Attributes:
        shards: int64 (S, 4): number, rows, bytes and time of the file of each shard.
    """

    shards: npt.NDArray[np.int64]

    @property
    def name(self) -> str:
        """Its name."""
        return f"{self.shards[0, 0]:05d}-{self.shards[-1, 0]:05d}"


@dataclass(frozen=True, slots=True)
class Part:
    """A finished part.

    Attributes:
        rows: mapped, of ``row_type``, sorted by list.
        sizes: int64 (L,), rows in each list.
        shards: as in its plan.
        best_ids, best_scores, best_lists: (Q, up to 10), of each query.
    """

    rows: Array
    sizes: npt.NDArray[np.int64]
    shards: npt.NDArray[np.int64]
    best_ids: npt.NDArray[np.int64]
    best_scores: npt.NDArray[np.float32]
    best_lists: npt.NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path, plan: PartPlan, trained: Trained) -> Part | None:
        """Return a part; None if it is missing, or of other shards or training."""
        try:
            with np.errstate(all="ignore"):
                values = read_npz(folder / f"{plan.name}.npz", _ARRAYS)
            if str(values["trained"]) != trained.digest:
                return None
            if not np.array_equal(values["shards"], plan.shards):
                return None
            rows = _mapped(folder / f"{plan.name}.rows.npy", trained.index.code_size)
        except (DataError, OSError, ValueError):
            return None
        names = ("sizes", "shards", "best_ids", "best_scores", "best_lists")
        part = cls(rows, *(values[name] for name in names))
        fits = len(part.sizes) == trained.index.nlist and part.sizes.sum() == len(rows)
        return part if fits else None


@dataclass(frozen=True, slots=True)
class EncodePart:
    """Makes parts, in any process; it is pickled to workers without the trained index."""

    folder: ShardFolder
    index: Path

    def __call__(self, plan: PartPlan) -> int:
        """Make a part; return its number of indexed rows.

        Raises:
            DataError: a shard is missing or damaged.
            CNClipError: the disk is full or read-only.
        """
        trained = Trained.open(self.index)
        if trained is None:
            raise DataError(
                _("{path} lacks its training; build it again", path=path_text(self.index))
            )
        with openmp_threads(1):
            rows, sizes, best = _encoded(self.folder, plan, trained)
        out = self.index / PARTS
        with map_write_errors(out):
            with atomic_file(out / f"{plan.name}.rows.npy") as path, path.open("wb") as stream:
                np.save(stream, rows)
            with atomic_file(out / f"{plan.name}.npz") as path, path.open("wb") as stream:
                np.savez(
                    stream,
                    sizes=sizes,
                    shards=plan.shards,
                    trained=np.array(trained.digest),
                    best_ids=best.ids,
                    best_scores=best.scores,
                    best_lists=best.lists,
                )
        return len(rows)


def row_type(code_bytes: int) -> np.dtype[Any]:
    """Return the type of a row of a part."""
    return np.dtype([("id", "<i8"), ("code", "u1", (code_bytes,))])


def planned_parts(folder: ShardFolder) -> list[PartPlan]:
    """Return the parts of a folder, of about half a million rows each.

    Raises:
        DataError: a file is missing or damaged.
    """
    plans: list[PartPlan] = []
    waiting: list[tuple[int, int, int, int]] = []
    for shard in folder.numbers:
        path, rows = folder.vector_path(shard), len(folder.vectors(shard))
        status = path.stat()
        if waiting and rows + sum(each[1] for each in waiting) > _PART_ROWS:
            plans.append(PartPlan(np.array(waiting, np.int64)))
            waiting = []
        waiting.append((shard, rows, status.st_size, status.st_mtime_ns))
    if waiting:
        plans.append(PartPlan(np.array(waiting, np.int64)))
    return plans


@dataclass(slots=True)
class Best:
    """The best rows for each of Q queries: ids, scores and lists (Q, up to 10), best first."""

    ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    lists: npt.NDArray[np.int64]

    @classmethod
    def none(cls, queries: int) -> Best:
        """Return no rows."""
        empty = np.empty((queries, 0), np.int64)
        return cls(empty, np.empty((queries, 0), np.float32), empty)

    def update(self, ids: Array, scores: Array, lists: Array) -> None:
        """Add rows: ids and lists (N,), and their scores (N, Q)."""
        if self.scores.shape[1] == TUNED_K:  # few rows are better than what is kept
            better = np.flatnonzero((scores > self.scores[:, -1]).any(axis=1))
            ids, scores, lists = ids[better], scores[better], lists[better]
        width = min(TUNED_K, len(ids))
        if not width:
            return
        rows = np.argpartition(scores, -width, axis=0)[-width:].T  # (Q, width)
        mine = np.take_along_axis(scores.T, rows, axis=1)
        self.keep(
            np.concatenate([self.ids, ids[rows]], axis=1),
            np.concatenate([self.scores, mine], axis=1),
            np.concatenate([self.lists, lists[rows]], axis=1),
        )

    def keep(self, ids: Array, scores: Array, lists: Array) -> None:
        """Keep the best of rows (Q, N)."""
        order = np.argsort(-scores, axis=1, kind="stable")[:, :TUNED_K]
        self.ids, self.scores, self.lists = (
            np.take_along_axis(values, order, axis=1) for values in (ids, scores, lists)
        )


def best_of_parts(parts: Sequence[Part]) -> Best:
    """Return the best rows of all parts."""
    best = Best.none(len(parts[0].best_ids))
    for part in parts:
        best.keep(
            np.concatenate([best.ids, part.best_ids], axis=1),
            np.concatenate([best.scores, part.best_scores], axis=1),
            np.concatenate([best.lists, part.best_lists], axis=1),
        )
    return best


def _encoded(
    folder: ShardFolder, plan: PartPlan, trained: Trained
) -> tuple[Array, npt.NDArray[np.int64], Best]:
    """Return the rows of a part sorted by list, how many each list has, and the best rows."""
    limit = int(plan.shards[:, 1].sum())
    rows = np.empty(limit, row_type(trained.index.code_size))
    lists = np.empty(limit, np.int64)
    done, best = 0, Best.none(len(trained.queries))
    for shard in plan.shards[:, 0].tolist():
        vectors = folder.vectors(shard).view(np.ndarray)
        for at in range(0, len(vectors), _BLOCK):
            stored = vectors[at : at + _BLOCK]
            valid = np.flatnonzero(has_direction(stored))
            values = float32_of(stored[valid])
            new = slice(done, done + len(valid))
            rows["id"][new] = ids_of(shard, valid + at)
            lists[new] = trained.lists_of(values)
            rows["code"][new] = trained.encode(values, lists[new])
            best.update(rows["id"][new], values @ trained.queries.T, lists[new])
            done = new.stop
    order = np.argsort(lists[:done], kind="stable")
    return rows[:done][order], np.bincount(lists[:done], minlength=trained.index.nlist), best


def _mapped(path: Path, code_bytes: int) -> Array:
    """Map the rows of a part into memory.

    Raises:
        DataError, OSError, ValueError: the file is missing or damaged.
    """
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    if rows.dtype != row_type(code_bytes) or rows.ndim != 1:
        raise ValueError(rows.dtype)
    return np.asarray(rows)

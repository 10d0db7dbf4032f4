"""Group millions of rows by 64-bit digests or by links, in arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt


def first_equal(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return for each of N keys the index of the first equal one, (N,)."""
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    repeated = sorted_keys[1:] == sorted_keys[:-1]
    del sorted_keys  # 80 MB for 10 M keys, like every array here
    starts = np.arange(len(keys))
    starts[1:][repeated] = 0
    np.maximum.accumulate(starts, out=starts)
    firsts = np.empty_like(order)
    firsts[order] = order[starts]
    return firsts


@dataclass(frozen=True, slots=True)
class RowGroups(Sequence[npt.NDArray[np.int64]]):
    """Groups of rows, 16 bytes per row: group ``i`` is ``rows[starts[i]:starts[i + 1]]``.

    Groups are in the order of their first rows; the rows of a group keep their order.
    """

    rows: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, at: int) -> npt.NDArray[np.int64]: ...

    @overload
    def __getitem__(self, at: slice) -> RowGroups: ...

    def __getitem__(self, at: int | slice) -> npt.NDArray[np.int64] | RowGroups:
        """Return the rows of one group, or a slice of the groups."""
        if isinstance(at, slice):
            first, last, _ = at.indices(len(self))
            starts = self.starts[first : last + 1]
            return RowGroups(self.rows[starts[0] : starts[-1]], starts - starts[0])
        if not 0 <= at < len(self):
            raise IndexError(at)
        return self.rows[self.starts[at] : self.starts[at + 1]]

    @property
    def firsts(self) -> npt.NDArray[np.int64]:
        """The first row of each group."""
        return self.rows[self.starts[:-1]]


def group_rows(rows: npt.NDArray[np.int64], keys: npt.NDArray[np.uint64]) -> RowGroups:
    """Group rows (N,) by keys (N,)."""
    firsts = first_equal(keys)
    order = np.argsort(firsts, kind="stable")
    sorted_firsts = firsts[order]
    changes = np.flatnonzero(sorted_firsts[1:] != sorted_firsts[:-1]) + 1
    ends = [len(rows)] if len(rows) else []
    return RowGroups(rows[order], np.concatenate([[0], changes, ends]).astype(np.int64))


def connected(count: int, links: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each of ``count`` nodes the first that links (2, K) connect it to, (count,)."""
    root = np.arange(count)
    while True:
        ends = root[links]
        if np.array_equal(*ends):
            return root
        for end in ends:  # one by one: numpy 2.4 reads beyond values that it has to broadcast
            np.minimum.at(root, end, ends.min(axis=0))
        while not np.array_equal(root, above := root[root]):
            root = above

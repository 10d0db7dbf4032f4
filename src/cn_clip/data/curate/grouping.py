"""Which of millions of rows belong together, by 64-bit digests in arrays instead of objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt


def first_equal(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return for each of N keys the place of the first that equals it."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    again = ordered[1:] == ordered[:-1]
    del ordered  # 80 MB for 10 M keys, as each array here
    starts = np.arange(len(keys))
    starts[1:][again] = 0
    np.maximum.accumulate(starts, out=starts)
    firsts = np.empty_like(order)
    firsts[order] = order[starts]
    return firsts


@dataclass(frozen=True, slots=True)
class Groups(Sequence[npt.NDArray[np.int64]]):
    """Rows that belong together, 16 bytes each: group ``i`` is ``rows[starts[i]:starts[i + 1]]``.

    Groups stand in the order of their first rows, and rows in their own order.
    """

    rows: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, at: int) -> npt.NDArray[np.int64]: ...

    @overload
    def __getitem__(self, at: slice) -> Groups: ...

    def __getitem__(self, at: int | slice) -> npt.NDArray[np.int64] | Groups:
        """Return the rows of a group, or several groups."""
        if isinstance(at, slice):
            first, last, _ = at.indices(len(self))
            starts = self.starts[first : last + 1]
            return Groups(self.rows[starts[0] : starts[-1]], starts - starts[0])
        if not 0 <= at < len(self):
            raise IndexError(at)
        return self.rows[self.starts[at] : self.starts[at + 1]]

    @property
    def firsts(self) -> npt.NDArray[np.int64]:
        """The first row of each group."""
        return self.rows[self.starts[:-1]]


def grouped(rows: npt.NDArray[np.int64], keys: npt.NDArray[np.uint64]) -> Groups:
    """Group N rows by N keys."""
    firsts = first_equal(keys)
    order = np.argsort(firsts, kind="stable")
    ordered = firsts[order]
    changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    ends = [len(rows)] if len(rows) else []
    return Groups(rows[order], np.concatenate([[0], changes, ends]).astype(np.int64))

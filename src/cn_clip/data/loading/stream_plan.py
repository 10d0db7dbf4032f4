"""The order of pairs that are read shard by shard, from object storage, networks and disks.

As in ``sampler``, the pair at a position is a function of (seed, epoch, position), without state.

- A pass over a source is a *line*: its shards, in the order of a keyed permutation, one after
  another. An epoch takes the next part of it, so no pair repeats before all were seen.
- A global batch consists of ``_LANES`` equal ranges, its *lanes*. Each lane has its own part of the
  line, so that each of 2, 4 or 8 processes reads other shards than the others.
- A lane's part of the line is cut into equal *slots*, which take turns: so many shards are open.
- A slot goes along its part in *windows*: the pairs within a window are permuted. A window is what
  has to be at hand; it is read at once, and never again in the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cn_clip.data.loading.permutation import mixed, permuted

OPEN_SHARDS, WINDOW = 64, 256
_LANES = 8  # numbers of processes that divide this share no shard
_BLOCK = 1024  # positions in which each source has its part of the pairs
_ORDER, _WITHIN, _TURN = 1 << 20, 1 << 21, 1 << 22  # keys of permutations

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring pairs of one shard, which are read at once: indexes ``first`` to ``stop``."""

    source: int
    first: int
    stop: int


class StreamPlan:
    """The pairs of each epoch of a mix in which some sources are read shard by shard.

    Attributes:
        sizes: lengths of the sources.
        counts: pairs per epoch of each.
        seed: of the order.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        counts: Sequence[int],
        seed: int,
        *,
        shards: Sequence[_Ints | None],
        global_batch_size: int,
        open_shards: int = OPEN_SHARDS,
        window: int = WINDOW,
    ) -> None:
        """Plan the epochs.

        Args:
            sizes, counts, seed: see the class.
            shards: the lengths of the shards of each source, None for one in random order.
            global_batch_size: the order of streamed pairs depends on it.
            open_shards: shards that pairs are mixed from.
            window: pairs that are permuted together; ``open_shards`` times this many are at hand.
        """
        self.sizes, self.counts, self.seed = tuple(sizes), tuple(counts), seed
        self._shards, self._batch, self._window = list(shards), global_batch_size, window
        self._slots = max(1, open_shards // _LANES)
        full, rest = divmod(len(self), global_batch_size)
        edges = np.arange(_LANES + 1)
        self._lane_edges = edges * global_batch_size // _LANES * full + edges * rest // _LANES
        """(lanes + 1,) the first of a lane's positions, if those of each lane are numbered on."""
        self._rank_edges = self._ranks(self._lane_edges)
        """(lanes + 1, sources) the same by source."""
        self._lines: dict[tuple[int, int], tuple[_Ints, _Ints]] = {}

    def __len__(self) -> int:
        """Return the number of pairs in an epoch."""
        return sum(self.counts)

    def pairs_at(self, epoch: int, positions: _Ints) -> tuple[_Ints, _Ints]:
        """Return the source (N,) and the index in it (N,) of the pairs at positions (N,)."""
        lanes, sources, ranks = self._turns(epoch, positions)
        indexes = np.empty_like(ranks)
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            mine = np.flatnonzero(sources == number)
            if self._shards[number] is not None:
                starts, within, _lengths = self._windows(epoch, number, lanes[mine], ranks[mine])
                before = starts + within + epoch * count
            else:
                before = ranks[mine] + epoch * count
            passes, offsets = np.divmod(before, size)
            for pass_ in np.unique(passes).tolist():
                chosen, at = mine[passes == pass_], offsets[passes == pass_]
                if self._shards[number] is None:
                    indexes[chosen] = permuted(at, size, self.seed, pass_, number + 1)
                else:
                    ends, firsts = self._line(number, pass_)
                    shard = np.searchsorted(ends, at, side="right")
                    indexes[chosen] = firsts[shard] + at
        return sources, indexes

    def spans(self, epoch: int, positions: _Ints) -> Iterator[Span]:
        """Yield what has to be at hand for the pairs at positions (N,): the windows they are in."""
        lanes, sources, ranks = self._turns(epoch, positions)
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            mine = sources == number
            if self._shards[number] is None or not mine.any():
                continue
            starts, _within, lengths = self._windows(epoch, number, lanes[mine], ranks[mine])
            starts, at = np.unique(starts, return_index=True)
            for start, length in zip(starts.tolist(), lengths[at].tolist(), strict=True):
                begin, stop = start + epoch * count, start + epoch * count + length
                while begin < stop:
                    pass_, offset = divmod(begin, size)
                    ends, firsts = self._line(number, pass_)
                    shard = int(np.searchsorted(ends, offset, side="right"))
                    taken = min(stop - begin, int(ends[shard]) - offset)
                    first = int(firsts[shard]) + offset
                    yield Span(number, first, first + taken)
                    begin += taken

    def _turns(self, epoch: int, positions: _Ints) -> tuple[_Ints, _Ints, _Ints]:
        """Return the lane, the source, and the rank among the epoch's pairs of this source, (N,)
        each, of the pairs at positions."""
        batches, offsets = np.divmod(positions, self._batch)
        sizes = np.minimum(self._batch, len(self) - batches * self._batch)
        lanes = ((offsets + 1) * _LANES - 1) // sizes
        per_batch = (lanes + 1) * self._batch // _LANES - lanes * self._batch // _LANES
        within_lane = batches * per_batch + offsets - lanes * sizes // _LANES
        if len(self.sizes) == 1:
            return lanes, np.zeros_like(lanes), self._lane_edges[lanes] + within_lane
        # In each block of a lane, every source has its part of the positions, in keyed order.
        blocks, at = np.divmod(within_lane, _BLOCK)
        first = self._lane_edges[lanes] + blocks * _BLOCK
        stop = np.minimum(first + _BLOCK, self._lane_edges[lanes + 1])
        turns = _permuted_by_size(at, stop - first, self.seed, epoch, _TURN)
        before, after = self._ranks(first), self._ranks(stop)
        ends = np.cumsum(after - before, axis=1)
        sources = (turns[:, None] >= ends).sum(axis=1)
        rows = np.arange(len(positions))
        begins = ends[rows, sources] - (after - before)[rows, sources]
        return lanes, sources, before[rows, sources] + turns - begins

    def _ranks(self, positions: _Ints) -> _Ints:
        """Return how many of the first ``positions`` (N,) are of each source: (N, sources).

        Each source takes its part of what the sources before it leave, rounded down, so none ever
        decreases, and at the end each has all its pairs.
        """
        left, pairs = positions.copy(), len(self)
        columns = []
        for count in self.counts:
            columns.append(left * count // pairs if count else np.zeros_like(left))
            left, pairs = left - columns[-1], pairs - count
        return np.stack(columns, axis=1)

    def _windows(
        self, epoch: int, number: int, lanes: _Ints, ranks: _Ints
    ) -> tuple[_Ints, _Ints, _Ints]:
        """Return the window of each pair of a source by its lane and rank, (N,) each: its first
        place on the epoch's line, the pair's place in it, and its length."""
        first, stop = self._rank_edges[lanes, number], self._rank_edges[lanes + 1, number]
        pairs = np.maximum(1, stop - first)
        slots = np.minimum(self._slots, pairs)
        rows, slot = np.divmod(ranks - first, slots)
        shortest, longer = np.divmod(pairs, slots)
        start = first + slot * shortest + np.minimum(slot, longer)
        windows, at = np.divmod(rows, self._window)
        lengths = np.minimum(self._window, shortest + (slot < longer) - windows * self._window)
        start += windows * self._window
        # One permutation for all windows of a length, each from another place on.
        turn = mixed(start.astype(np.uint64) + np.uint64(self.seed + 1)) >> np.uint64(33)
        within = _permuted_by_size(at, lengths, self.seed, epoch, number + 1, _WITHIN)
        return start, (within + turn.astype(np.int64)) % lengths, lengths

    def _line(self, number: int, pass_: int) -> tuple[_Ints, _Ints]:
        """Return for each shard on the line of a pass (S,): the end of its range, and what to add
        to a place on the line to get the index of the pair."""
        if (number, pass_) not in self._lines:
            sizes = self._shards[number]
            assert sizes is not None
            order = permuted(
                np.arange(len(sizes)), len(sizes), self.seed, pass_, number + 1, _ORDER
            )
            firsts = np.cumsum(sizes) - sizes
            ends = np.cumsum(sizes[order])
            if len(self._lines) >= 2 * len(self.sizes):
                self._lines.clear()
            self._lines[number, pass_] = ends, firsts[order] - (ends - sizes[order])
        return self._lines[number, pass_]


def _permuted_by_size(at: _Ints, sizes: _Ints, *key: int) -> _Ints:
    """Return the values at places (N,) of keyed permutations of so many numbers, (N,)."""
    values = np.empty_like(at)
    for size in np.unique(sizes).tolist():
        chosen = sizes == size
        values[chosen] = permuted(at[chosen], size, *key)
    return values

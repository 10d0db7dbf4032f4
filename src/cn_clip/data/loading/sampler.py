"""The order of training pairs: a pure function of (seed, epoch, position).

There is no shuffled list and no state: a keyed permutation maps a position to a pair, so any number
of processes can start at any position and agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cn_clip.data.loading.permutation import permuted
from cn_clip.data.loading.stream_plan import Span, StreamPlan
from cn_clip.data.sources.base import Source
from cn_clip.data.sources.open import Chain, WeightedSource
from cn_clip.errors import UsageError
from cn_clip.translation import _


@dataclass(frozen=True, slots=True)
class Plan:
    """The pairs of each epoch of a mix, and their order.

    ``sizes`` are the lengths of the sources, ``counts`` the pairs per epoch of each. Each pass over
    a source has its own permutation, so no pair repeats before all were seen, across epochs too.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    seed: int

    def __len__(self) -> int:
        """Return the number of pairs in an epoch."""
        return sum(self.counts)

    def pairs_at(
        self, epoch: int, positions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the source (N,) and the index in it (N,) of the pairs at positions (N,)."""
        drawn = permuted(positions, len(self), self.seed, epoch)
        ends = np.cumsum(self.counts)
        sources = np.searchsorted(ends, drawn, side="right")
        indexes = np.empty_like(drawn)
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            mine = np.flatnonzero(sources == number)
            # Pairs of this source drawn before, in this epoch and earlier ones.
            before = drawn[mine] - (ends[number] - count) + epoch * count
            passes, offsets = np.divmod(before, size)
            for pass_ in np.unique(passes).tolist():
                chosen = mine[passes == pass_]
                indexes[chosen] = permuted(
                    offsets[passes == pass_], size, self.seed, pass_, number + 1
                )
        return sources, indexes


def plan_of(
    mix: Sequence[WeightedSource], seed: int, global_batch_size: int = 1
) -> Plan | StreamPlan:
    """Plan the epochs of a mix: weight times length pairs of each source.

    If a source is streamed, it is a ``StreamPlan``, which depends on the batch size.

    Raises:
        UsageError: an epoch would be empty.
    """
    sizes = tuple(len(part.source) for part in mix)
    counts = tuple(round(part.weight * size) for part, size in zip(mix, sizes, strict=True))
    if not sum(counts):
        raise UsageError(_("an epoch of these sources has no pairs; raise their weights"))
    shards = [shard_sizes(part.source) for part in mix]
    if all(lengths is None for lengths in shards):
        return Plan(sizes, counts, seed)
    return StreamPlan(sizes, counts, seed, shards=shards, global_batch_size=global_batch_size)


def shard_sizes(source: Source) -> npt.NDArray[np.int64] | None:
    """Return the number of pairs of each shard of a streamed source; None for other sources."""
    if not isinstance(source, Chain) or not source.streamed:
        return None
    return np.array([len(part) for part in source.parts], np.int64)


@dataclass(frozen=True, slots=True)
class BatchPart:
    """The pairs of one process's local batch: source numbers (B,) and indexes in them (B,).

    ``spans`` are the streamed pairs that the batch needs at hand.
    """

    epoch: int
    batch: int
    sources: npt.NDArray[np.int64]
    indexes: npt.NDArray[np.int64]
    spans: tuple[Span, ...] = ()


def batches(
    plan: Plan | StreamPlan,
    epoch: int,
    global_batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
) -> Iterator[BatchPart]:
    """Yield the local batches of process ``rank`` in an epoch, from batch ``start`` on.

    Global batches do not depend on the number of processes: each is split into ``world_size``
    contiguous parts whose lengths differ by at most one. The last batch holds the remaining pairs,
    without repeats; it is dropped if it has less than one pair per process.

    Raises:
        UsageError: a batch has less than one pair per process.
    """
    if global_batch_size < world_size:
        raise UsageError(
            _(
                "a global batch of {global_batch_size} cannot be split over {world_size} "
                "processes; raise it, or start fewer",
                global_batch_size=global_batch_size,
                world_size=world_size,
            )
        )
    for batch in range(start, batch_count(plan, global_batch_size, world_size)):
        first = batch * global_batch_size
        size = min(global_batch_size, len(plan) - first)
        mine = np.arange(first + size * rank // world_size, first + size * (rank + 1) // world_size)
        spans = tuple(plan.spans(epoch, mine)) if isinstance(plan, StreamPlan) else ()
        yield BatchPart(epoch, batch, *plan.pairs_at(epoch, mine), spans)


def batch_count(plan: Plan | StreamPlan, global_batch_size: int, world_size: int = 1) -> int:
    """Return the number of batches in an epoch."""
    full, rest = divmod(len(plan), global_batch_size)
    return full + (rest >= world_size)

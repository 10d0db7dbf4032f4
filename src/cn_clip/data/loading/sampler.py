"""The order of training: a pure function of (seed, epoch, position).

Nothing is shuffled and nothing is kept: a keyed permutation tells which pair stands at a position,
so that any process can begin anywhere, and all agree, however many they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cn_clip.data.sources.open import Weighted
from cn_clip.errors import UsageError

_ROUNDS = 6  # of the Feistel network; 4 already make it pseudo-random (Luby and Rackoff, 1988)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which pairs an epoch of a mix holds, and in which order.

    ``sizes`` are the lengths of the sources, ``counts`` how many pairs of each an epoch takes. A
    source is gone through in an order of its own, and again in another one when it is through; so
    every pair of it comes once before any comes twice, across epochs too.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    seed: int

    def __len__(self) -> int:
        """Return the number of pairs in an epoch."""
        return sum(self.counts)

    def places(
        self, epoch: int, positions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return which source and which of its pairs stand at positions (N,) of an epoch."""
        drawn = permuted(positions, len(self), self.seed, epoch)
        ends = np.cumsum(self.counts)
        sources = np.searchsorted(ends, drawn, side="right")
        indexes = np.empty_like(drawn)
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            mine = np.flatnonzero(sources == number)
            # How many of this source were drawn before, in this epoch and in those before it.
            before = drawn[mine] - (ends[number] - count) + epoch * count
            passes, offsets = np.divmod(before, size)
            for each in np.unique(passes).tolist():
                chosen = mine[passes == each]
                indexes[chosen] = permuted(
                    offsets[passes == each], size, self.seed, each, number + 1
                )
        return sources, indexes


def plan_of(mix: Sequence[Weighted], seed: int) -> Plan:
    """Plan the epochs of a mix: of each source, its weight times its length.

    Raises:
        UsageError: an epoch would hold nothing.
    """
    sizes = tuple(len(part.source) for part in mix)
    counts = tuple(round(part.weight * size) for part, size in zip(mix, sizes, strict=True))
    if not sum(counts):
        raise UsageError("an epoch of these sources holds no pair; raise their weights")
    return Plan(sizes, counts, seed)


@dataclass(frozen=True, slots=True)
class BatchPart:
    """One process's share of a global batch: which sources, and which of their pairs."""

    epoch: int
    batch: int
    sources: npt.NDArray[np.int64]
    indexes: npt.NDArray[np.int64]


def batches(
    plan: Plan,
    epoch: int,
    global_batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    drop_last: bool = False,
) -> Iterator[BatchPart]:
    """Yield this process's shares of an epoch's batches, from batch ``start`` on.

    Together the processes hold the same pairs in the same order, whatever their number: process
    ``rank`` has the ``rank``-th of ``world_size`` runs, whose lengths differ by one at most. The
    last batch is what is left, never filled up with pairs that were there before; if it has less
    than one pair for each process, it is left out.

    Raises:
        UsageError: a batch has less than one pair for each process.
    """
    if global_batch_size < world_size:
        raise UsageError(
            f"a global batch of {global_batch_size} cannot be shared by {world_size} processes; "
            "raise it, or start fewer"
        )
    for batch in range(start, batch_count(plan, global_batch_size, world_size, drop_last)):
        first = batch * global_batch_size
        size = min(global_batch_size, len(plan) - first)
        mine = np.arange(first + size * rank // world_size, first + size * (rank + 1) // world_size)
        yield BatchPart(epoch, batch, *plan.places(epoch, mine))


def batch_count(
    plan: Plan, global_batch_size: int, world_size: int = 1, drop_last: bool = False
) -> int:
    """Return how many batches an epoch has."""
    whole, rest = divmod(len(plan), global_batch_size)
    return whole + (rest >= world_size and not drop_last)


def permuted(positions: npt.NDArray[np.int64], size: int, *key: int) -> npt.NDArray[np.int64]:
    """Return what a keyed permutation of ``range(size)`` puts at ``positions`` (N,).

    A Feistel network over the next even number of bits, walked until it falls below ``size``
    (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): each
    position alone, in constant time and memory.
    """
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    values = positions.astype(np.uint64)
    out = np.empty_like(values)
    left = np.arange(len(values))
    while len(left):
        high, low = values >> np.uint64(half), values & mask
        for each in keys:
            high, low = low, high ^ (_mixed(low ^ each) & mask)
        values = (high << np.uint64(half)) | low
        fits = values < np.uint64(size)
        out[left[fits]] = values[fits]
        left, values = left[~fits], values[~fits]
    return out.astype(np.int64)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix 64 bits well: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

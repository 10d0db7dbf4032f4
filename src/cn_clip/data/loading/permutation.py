"""A keyed permutation in constant time and memory per position."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_ROUNDS = 6  # of the Feistel network; 4 suffice to be pseudo-random (Luby and Rackoff, 1988)


def permuted(positions: npt.NDArray[np.int64], size: int, *key: int) -> npt.NDArray[np.int64]:
    """Return the values of a keyed permutation of ``range(size)`` at ``positions`` (N,).

    A Feistel network over the next even number of bits, repeated until the value is below ``size``
    (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): constant time
    and memory per position.
    """
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    values = positions.astype(np.uint64)
    out = np.empty_like(values)
    left = np.arange(len(values))
    while len(left):
        high, low = values >> np.uint64(half), values & mask
        for round_key in keys:
            high, low = low, high ^ (mixed(low ^ round_key) & mask)
        values = (high << np.uint64(half)) | low
        fits = values < np.uint64(size)
        out[left[fits]] = values[fits]
        left, values = left[~fits], values[~fits]
    return out.astype(np.int64)


def mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix 64 bits: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

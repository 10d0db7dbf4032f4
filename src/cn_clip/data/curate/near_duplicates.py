"""Near-duplicates among the hashes of many images, which are in a file."""

from __future__ import annotations

from hashlib import blake2b
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import numpy.typing as npt

from cn_clip.data.curate.grouping import first_equal
from cn_clip.data.curate.perceptual_hash import HASH_WORDS, Hashes, near_pairs

_BLOCK = 1 << 14  # hashes in memory at once


def near_duplicates(
    hash_file: IO[bytes], count: int, threshold: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the near-duplicates among ``count`` hashes in a file: later and earlier numbers (K,).

    Of equal hashes, each later one is paired with the first only, and the first alone is compared
    with others: an image repeated a thousand times would make a million pairs.
    """
    hashes = _memory_map(hash_file, count)
    digests = [_short_digests(hashes[at]) for at in _blocks(count)]
    first = first_equal(np.concatenate([np.empty(0, np.uint64), *digests]))
    repeated = np.flatnonzero(first != np.arange(count))
    distinct = np.flatnonzero(first == np.arange(count))
    with TemporaryFile() as distinct_file:
        for at in _blocks(len(distinct)):
            distinct_file.write(hashes[distinct[at]].tobytes())
        later, earlier = near_pairs(_memory_map(distinct_file, len(distinct)), threshold)
    return (
        np.concatenate([repeated, distinct[later]]),
        np.concatenate([first[repeated], distinct[earlier]]),
    )


def _memory_map(hash_file: IO[bytes], count: int) -> Hashes:
    """Map the hashes in a file into memory."""
    hash_file.flush()
    return np.memmap(hash_file, np.uint64, "r", shape=(count, HASH_WORDS))


def _blocks(count: int) -> list[slice]:
    return [slice(at, min(at + _BLOCK, count)) for at in range(0, count, _BLOCK)]


def _short_digests(hashes: Hashes) -> npt.NDArray[np.uint64]:
    """Return a 64-bit digest of each of N hashes (N, 36)."""
    short = b"".join(blake2b(row.tobytes(), digest_size=8).digest() for row in hashes)
    return np.frombuffer(short, dtype=np.uint64)

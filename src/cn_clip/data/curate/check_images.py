"""Problems of images: unreadable, small, near-duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import numpy.typing as npt

from cn_clip.data.curate.check_result import CheckResult
from cn_clip.data.curate.grouping import first_equal
from cn_clip.data.curate.perceptual_hash import HASH_WORDS, Hashes, hash_image, near_pairs
from cn_clip.data.sources.base import Source, located
from cn_clip.errors import CNClipError
from cn_clip.image.decode import read_image
from cn_clip.translation import _

_BLOCK = 1 << 14  # hashes in memory at once
_SMALL = 64  # pixels of the shorter side


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Pair indexes (N,), shorter image sides (N,), and hashes (N, 36), or (0, 36) without hashing;
    (index, reason) of each unreadable image."""

    indexes: npt.NDArray[np.int64]
    sides: npt.NDArray[np.int64]
    hashes: Hashes
    errors: list[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class ReadImages:
    """Decodes and hashes images, in a worker process."""

    source: Source
    hashed: bool

    def __call__(self, indexes: npt.NDArray[np.int64]) -> ImageBatch:
        decoded, sides, hashes, errors = [], [], [], []
        for index in indexes.tolist():
            try:
                image = read_image(self.source.image(index), background="white")
            except CNClipError as error:
                errors.append((index, located(self.source, index, error)))
                continue
            decoded.append(index)
            sides.append(min(image.size))
            if self.hashed:
                hashes.append(hash_image(image))
            del image  # before the next is decoded: both may be large
        stacked = np.stack(hashes) if hashes else np.empty((0, HASH_WORDS), dtype=np.uint64)
        return ImageBatch(
            np.array(decoded, dtype=np.int64), np.array(sides, dtype=np.int64), stacked, errors
        )


def add_image_problems(source: Source, batch: ImageBatch, result: CheckResult) -> None:
    """Add problems of single images."""
    for index, error in batch.errors:
        result.add("image", index, error)
    result.sides.update(batch.sides.tolist())
    sides = dict(zip(batch.indexes.tolist(), batch.sides.tolist(), strict=True))

    def small(index: int) -> str:
        return _(
            "{where}: its shorter side is {side} pixels",
            where=source.where(index),
            side=sides[index],
        )

    result.add_all("small", batch.indexes[batch.sides < _SMALL], small)


def add_near_duplicates(
    source: Source,
    indexes: npt.NDArray[np.int64],
    hash_file: IO[bytes],
    result: CheckResult,
    threshold: int,
) -> None:
    """Add near-duplicate images; ``hash_file`` holds the hashes of the pairs ``indexes``."""
    if len(indexes) < 2:
        return
    hashes = _memory_map(hash_file, len(indexes))
    # First by equality: an image repeated a thousand times would make a million near pairs.
    before = first_equal(
        np.concatenate([_short_digests(hashes[at]) for at in _blocks(len(indexes))])
    )
    positions = np.arange(len(indexes))
    distinct = np.flatnonzero(before == positions)
    with TemporaryFile() as distinct_file:
        for at in _blocks(len(distinct)):
            distinct_file.write(hashes[distinct[at]].tobytes())
        distinct_hashes = _memory_map(distinct_file, len(distinct))
        later, earlier = (distinct[rows] for rows in near_pairs(distinct_hashes, threshold))
    np.minimum.at(before, later, earlier)
    duplicates = np.flatnonzero(before != positions)

    def same(index: int) -> str:
        first = indexes[before[np.searchsorted(indexes, index)]]
        return _(
            "{where}: looks like {earlier}",
            where=source.where(index),
            earlier=source.where(int(first)),
        )

    result.add_all("same image", indexes[duplicates], same)


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

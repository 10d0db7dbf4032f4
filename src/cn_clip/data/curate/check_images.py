"""Problems of images: unreadable, small, near-duplicates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from cn_clip.data.curate.check_result import CheckResult
from cn_clip.data.curate.near_duplicates import near_duplicates
from cn_clip.data.curate.perceptual_hash import HASH_WORDS, Hashes, hash_image
from cn_clip.data.sources.base import Source, located
from cn_clip.errors import CNClipError
from cn_clip.image.decode import read_image
from cn_clip.translation import _

_SMALL = 64  # pixels of the shorter side


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Pair indexes (N,), shorter image sides (N,), and hashes (N, 36), or (0, 36) without hashing;
    (index, reason) of each unreadable image."""

    indexes: npt.NDArray[np.int64]
    sides: npt.NDArray[np.int64]
    hashes: Hashes
    errors: list[tuple[int, str]]

    @classmethod
    def joined(cls, batches: Sequence[Self]) -> Self:
        """Return the images of consecutive batches."""
        return cls(
            np.concatenate([batch.indexes for batch in batches]),
            np.concatenate([batch.sides for batch in batches]),
            np.concatenate([batch.hashes for batch in batches]),
            [error for batch in batches for error in batch.errors],
        )

    def to_arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """Return all of it in arrays."""
        errors = np.array(json.dumps(self.errors))
        return {
            "indexes": self.indexes, "sides": self.sides, "hashes": self.hashes, "errors": errors,
        }  # fmt: skip

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Return what ``to_arrays`` gave."""
        errors = [(index, reason) for index, reason in json.loads(str(arrays["errors"]))]
        return cls(arrays["indexes"], arrays["sides"], arrays["hashes"], errors)

    @classmethod
    def names(cls) -> Sequence[str]:
        """Return the names of its arrays."""
        return ("indexes", "sides", "hashes", "errors")


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
    before = np.arange(len(indexes))
    later, earlier = near_duplicates(hash_file, len(indexes), threshold)
    np.minimum.at(before, later, earlier)
    duplicates = np.flatnonzero(before != np.arange(len(indexes)))

    def same(index: int) -> str:
        first = indexes[before[np.searchsorted(indexes, index)]]
        return _(
            "{where}: looks like {earlier}",
            where=source.where(index),
            earlier=source.where(int(first)),
        )

    result.add_all("same image", indexes[duplicates], same)

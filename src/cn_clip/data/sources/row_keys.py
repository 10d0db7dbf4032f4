"""Which images and captions of a source are equal, and how long its texts are, without its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cn_clip.data.captions import digest, plain
from cn_clip.data.sources.array_file import ArrayFile, strings
from cn_clip.data.sources.base import Row

_MAX_LENGTH = (1 << 16) - 1  # longer texts count as this long


@runtime_checkable
class Indexed(Protocol):
    """A source whose index knows its rows."""

    def image_keys(self, part: int, first: int) -> npt.NDArray[np.uint64]:
        """Return a digest of the image id of each row: uint64 (N,).

        Args:
            part: number of this file in its source: ids are unique within one file only.
            first: index of its first row in the source. An unreadable row has a key of its own.
        """
        ...

    def captions(self) -> npt.NDArray[np.uint64]:
        """Return a digest of each caption without width, case, spaces and punctuation, uint64 (N,);
        0 for an unreadable row."""
        ...

    def lengths(self) -> npt.NDArray[Any]:
        """Return the characters of each text plus 1, at most 65,535; 0 for an unreadable row."""
        ...


def image_key(part: int, image_id: str) -> int:
    """Return the key of an image: ids are unique within one file of a source only."""
    return digest(f"{part}\0{image_id}")


def unreadable_key(index: int) -> int:
    """Return the key of a row that cannot be read: an image of its own."""
    return digest(f"\0{index}")


def caption_key(text: str) -> int:
    """Return the digest by which captions are compared: without width, case, spaces and
    punctuation, unless nothing else is left."""
    return digest(plain(text) or text)


def image_keys(arrays: ArrayFile, count: int, part: int, first: int) -> npt.NDArray[np.uint64]:
    """Return the keys of the images of rows from an index: uint64 (N,).

    Args:
        arrays: ``id``, the ids of ``count`` images; ``sample``, the image of each row, unless each
            row has its own; ``length`` of each text, 0 for unreadable rows.
        part, first: see ``Indexed.image_keys``.
    """
    samples = arrays.get("sample")
    ids = strings(arrays, "id", count)
    keys = np.fromiter((image_key(part, image_id) for image_id in ids), np.uint64, count)
    keys = keys if samples is None else keys[samples]
    for index in np.flatnonzero(arrays["length"] == 0).tolist():
        keys[index] = unreadable_key(first + index)
    return keys


def captions_of(rows: Sequence[Row | None]) -> npt.NDArray[np.uint64]:
    """Return the caption keys of rows, of which None is unreadable: uint64 (N,)."""
    return np.array([0 if row is None else caption_key(row.text) for row in rows], np.uint64)


def lengths_of(rows: Sequence[Row | None]) -> npt.NDArray[np.int64]:
    """Return the lengths of rows, of which None is unreadable: int64 (N,)."""
    lengths = [0 if row is None else min(len(row.text) + 1, _MAX_LENGTH) for row in rows]
    return np.array(lengths, np.int64)

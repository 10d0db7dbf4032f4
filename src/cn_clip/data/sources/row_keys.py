"""Keys of rows: which images and captions are equal, and how long texts are, without the rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cn_clip.data.captions import digest, plain
from cn_clip.data.sources.base import Row, Source
from cn_clip.errors import CNClipError

_ROWS = 1 << 13  # read at once
_MAX_LENGTH = (1 << 16) - 1  # longer texts count as this long
_NAMES = ("image_key", "text_key", "caption_key", "length")


@dataclass(frozen=True, slots=True)
class RowKeys:
    """Keys of N consecutive rows of a source.

    Attributes:
        images: uint64 (N,), digests of the image ids; unreadable rows have one each.
        texts: uint64 (N,), digests of the text ids.
        captions: uint64 (N,), digests of the captions, without width, case, spaces and punctuation.
        lengths: (N,), characters of each text plus 1, at most 65,535; 0 for an unreadable row.
    """

    images: npt.NDArray[np.uint64]
    texts: npt.NDArray[np.uint64]
    captions: npt.NDArray[np.uint64]
    lengths: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.images)

    def in_part(self, number: int) -> RowKeys:
        """Return the keys with ids of one file among several: ids are unique within a file only."""
        salt = np.uint64(digest(f"part {number}") if number else 0)
        return RowKeys(self.images ^ salt, self.texts ^ salt, self.captions, self.lengths)


@runtime_checkable
class Indexed(Protocol):
    """A source whose keys are in its index."""

    def keys(self) -> RowKeys: ...


def row_keys(parts: Sequence[Source]) -> Iterator[RowKeys]:
    """Yield the keys of all rows of a source's files, in order, from their indexes if they have
    any."""
    for number, part in enumerate(parts):
        if isinstance(part, Indexed):
            yield part.keys().in_part(number)
        else:
            for first in range(0, len(part), _ROWS):
                yield read_keys(part, range(first, min(first + _ROWS, len(part)))).in_part(number)


def read_keys(source: Source, indexes: range) -> RowKeys:
    """Read rows and return their keys."""
    return keys_of([_readable(source, index) for index in indexes], indexes.start)


def keys_of(rows: Sequence[Row | None], first: int) -> RowKeys:
    """Return the keys of rows, of which None is unreadable; ``first`` is the index of the first."""
    images, texts, captions = (np.empty(len(rows), np.uint64) for _ in range(3))
    lengths = np.zeros(len(rows), np.int64)
    for at, row in enumerate(rows):
        if row is None:
            images[at] = texts[at] = captions[at] = digest(f"\0{first + at}")
            continue
        images[at] = digest(row.image_id)
        same_id = row.text_id == row.image_id
        texts[at] = images[at] if same_id else digest(row.text_id)
        captions[at] = digest(plain(row.text) or row.text)
        lengths[at] = min(len(row.text) + 1, _MAX_LENGTH)
    return RowKeys(images, texts, captions, lengths)


def _readable(source: Source, index: int) -> Row | None:
    try:
        return source.row(index)
    except CNClipError:
        return None


def arrays_of(keys: RowKeys) -> dict[str, npt.NDArray[Any]]:
    """Return keys as arrays of an index: text ids that equal their image ids take no space."""
    arrays = dict(zip(_NAMES, (keys.images, keys.texts, keys.captions, keys.lengths), strict=True))
    if np.array_equal(keys.images, keys.texts):
        del arrays["text_key"]
    return arrays


def from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> RowKeys:
    """Return the keys that ``arrays_of`` stored."""
    images = arrays["image_key"]
    texts = arrays.get("text_key", images)
    return RowKeys(images, texts, arrays["caption_key"], arrays["length"])

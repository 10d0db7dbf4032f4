"""The index of a source of rows: image ids, captions and lengths, read once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.data.process_map import Workers, chunked, parallel_map
from cn_clip.data.sources.array_file import (
    ArrayFile,
    mapped,
    smallest,
    string_arrays,
    write_arrays,
)
from cn_clip.data.sources.base import Row, Source
from cn_clip.data.sources.index_cache import cached_index
from cn_clip.data.sources.row_keys import Indexed, captions_of, image_keys, lengths_of
from cn_clip.data.sources.table import Manifest
from cn_clip.errors import CNClipError

_MANY = 100_000  # rows; fewer are read faster than an index is worth
_CHUNK = 8192
_SUFFIX = ".3.rows"


def index_of(source: Source, *, workers: Workers = 0) -> Indexed | None:
    """Return the index of a file of pairs, which is built once; None if it has none, or few rows.

    Args:
        source: one file, not a chain of files.
        workers: that build it; 0 builds it in this process.

    Raises:
        CNClipError: the index cannot be written.
    """
    if isinstance(source, Indexed):
        return source
    if not isinstance(source, Manifest) or len(source) < _MANY:
        return None

    def write(path: Path) -> None:
        _write(source, workers, path)

    def read(path: Path) -> _RowIndex:
        return _RowIndex(mapped(path))

    file = source.table_file
    return cached_index(file, file.state(), f"-{source.layout}{_SUFFIX}", write, read)


@dataclass(frozen=True, slots=True)
class _RowIndex:
    arrays: ArrayFile

    def image_keys(self, part: int, first: int) -> npt.NDArray[np.uint64]:
        return image_keys(self.arrays, len(self.arrays["length"]), part, first)

    def captions(self) -> npt.NDArray[np.uint64]:
        return self.arrays["caption_key"]

    def lengths(self) -> npt.NDArray[Any]:
        return self.arrays["length"]


@dataclass(frozen=True, slots=True)
class _Read:
    """Reads rows, in a worker process."""

    source: Source

    def __call__(
        self, indexes: range
    ) -> tuple[list[str], npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        rows = [self._row(index) for index in indexes]
        ids = ["" if row is None else row.image_id for row in rows]
        return ids, captions_of(rows), lengths_of(rows)

    def _row(self, index: int) -> Row | None:
        try:
            return self.source.row(index)
        except CNClipError:
            return None


def _write(source: Source, workers: Workers, path: Path) -> None:
    ids: list[str] = []
    captions: list[npt.NDArray[np.uint64]] = []
    lengths: list[npt.NDArray[np.int64]] = []
    with parallel_map(_Read(source), workers) as run:
        results: Iterator[Any] = run(chunked(range(len(source)), _CHUNK))
        for chunk_ids, chunk_captions, chunk_lengths in results:
            ids += chunk_ids
            captions.append(chunk_captions)
            lengths.append(chunk_lengths)
    arrays: dict[str, npt.NDArray[Any]] = {
        **string_arrays("id", ids),
        "caption_key": np.concatenate(captions),
        "length": smallest(np.concatenate(lengths)),
    }
    write_arrays(path, arrays, {})

"""Single vectors read from many shards: what the index has found is scored exactly from them.

A thousand shards are more than a process may have open, and mapping a file takes longer than
reading a few rows. So rows are read by ``pread``; the last files stay open.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import DataError
from cn_clip.search.kernels import float32_of
from cn_clip.shards.folder import Rows, ShardFolder, mapped_vectors, shards_and_rows
from cn_clip.text import path_text
from cn_clip.translation import _

Array = npt.NDArray[Any]

_OPEN_FILES = 256  # processes may have 1,024 or more


class RowReader:
    """Reads vectors of a folder by their ids. Thread-safe."""

    def __init__(self, folder: ShardFolder) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._layouts: dict[int, _Layout] = {}
        self._files: OrderedDict[int, _File] = OrderedDict()

    def read(self, ids: Rows) -> npt.NDArray[np.float32]:
        """Return the vectors (N, D) of ids (N,) in ascending order; an id that does not exist gets
        a row of zeros.

        Raises:
            DataError: a file is missing or damaged.
        """
        shards, rows = shards_and_rows(ids)
        values = np.zeros((len(ids), self._folder.dim), np.float32)
        wanted = [
            (self._file(int(shards[at])), at, end)
            for at, end in _runs(shards)
            if int(shards[at]) in self._folder.names
        ]
        for file, at, end in wanted:  # all at once: a disk answers many requests together
            file.announce(rows[at:end])
        for file, at, end in wanted:
            file.read(rows[at:end], values[at:end])
        return values

    def _file(self, shard: int) -> _File:
        """Return the open file of a shard; it is closed when neither this nor a reader needs it."""
        with self._lock:
            file = self._files.pop(shard, None)
            if file is None:
                path = self._folder.vector_path(shard)
                layout = self._layouts.get(shard) or _layout(path, self._folder.dim)
                self._layouts[shard] = layout
                file = _File(path, layout)
            self._files[shard] = file
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return file


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the rows of a ``.npy`` file are."""

    rows: int
    offset: int
    row_bytes: int
    dtype: np.dtype[Any]


def _layout(path: Path, dim: int) -> _Layout:
    vectors = mapped_vectors(path, dim)
    if len(vectors) and not isinstance(vectors, np.memmap):  # a copy: its rows are not in the file
        raise DataError(
            _("{path} is stored by columns; write it again by rows", path=path_text(path))
        )
    offset = int(getattr(vectors, "offset", 0))
    return _Layout(len(vectors), offset, dim * vectors.dtype.itemsize, vectors.dtype)


class _File:
    """An open file of vectors."""

    def __init__(self, path: Path, layout: _Layout) -> None:
        self._path, self._layout = path, layout
        try:
            self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise DataError(
                _("{path} cannot be read: {reason}", path=path_text(path), reason=error.strerror)
            ) from None

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def announce(self, rows: Rows) -> None:
        """Let the system read rows ahead."""
        if hasattr(os, "posix_fadvise"):
            for offset, size in self._places(rows):
                os.posix_fadvise(self._handle, offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, rows: Rows, into: npt.NDArray[np.float32]) -> None:
        """Read rows into an array; those that do not exist stay as they are."""
        valid = np.flatnonzero(rows < self._layout.rows)
        raw = bytearray()
        for offset, size in self._places(rows[valid]):
            piece = os.pread(self._handle, size, offset)
            if len(piece) != size:
                raise DataError(
                    _(
                        "{path} became shorter while it was read; see: cn-clip bulk verify",
                        path=path_text(self._path),
                    )
                )
            raw += piece
        stored = np.frombuffer(raw, self._layout.dtype).reshape(len(valid), into.shape[1])
        into[valid] = float32_of(stored)

    def _places(self, rows: Rows) -> list[tuple[int, int]]:
        """Return offset and size of each row."""
        size = self._layout.row_bytes
        return [(self._layout.offset + row * size, size) for row in rows.tolist()]


def _runs(values: Rows) -> list[tuple[int, int]]:
    """Return start and end of each run of equal values."""
    if not len(values):
        return []
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(values)], strict=True))

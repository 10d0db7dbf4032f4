"""The vectors of a library: one float16 row per image in a file that only grows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import LibraryError
from cn_clip.publish import map_write_errors
from cn_clip.text import path_text
from cn_clip.translation import _

Rows = npt.NDArray[np.float16]

DTYPE = np.dtype("<f2")
_PAGE = 4096  # bytes; zeros are left out of a file in whole pages
_COPIED_TOGETHER = 1 << 24  # bytes
_ERASED_TOGETHER = 1 << 14  # rows


@dataclass(frozen=True, slots=True)
class VectorFile:
    """Unit vectors, float16 (N, dim), in ``path``; how many rows count is in the database.

    A row of zeros is an image without a vector.
    """

    path: Path
    dim: int

    def open(self, rows: int) -> Rows:
        """Map the first ``rows`` rows into memory, read-only.

        Raises:
            LibraryError: the file is shorter, or cannot be read.
        """
        if not rows:
            return np.empty((0, self.dim), DTYPE)
        if (stored := self.rows_stored()) < rows:
            raise LibraryError(
                _(
                    "{path} holds {stored:,} vectors, not {rows:,}; embed the missing images "
                    "again with: cn-clip library repair",
                    path=path_text(self.path),
                    stored=stored,
                    rows=rows,
                )
            )
        try:
            return np.memmap(self.path, DTYPE, "r", shape=(rows, self.dim))
        except OSError as error:
            raise LibraryError(
                _("{path} cannot be read: {reason}", path=self.path, reason=error.strerror)
            ) from None

    def rows_stored(self) -> int:
        """Return the number of whole rows in the file; 0 if it does not exist."""
        try:
            return self.path.stat().st_size // self._row_bytes
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise LibraryError(
                _("{path} cannot be read: {reason}", path=self.path, reason=error.strerror)
            ) from None

    def write(self, row: int, vectors: npt.NDArray[Any]) -> None:
        """Write vectors (N, dim) from a row on, and sync them to disk.

        Raises:
            CNClipError: the disk is full or read-only.
        """
        with self._writing() as handle:
            self._put(handle, row, vectors)

    def overwrite(self, rows: npt.NDArray[np.int64], vectors: npt.NDArray[Any]) -> None:
        """Write vectors (N, dim) to rows (N,) in ascending order, and sync them once.

        Raises:
            CNClipError: the disk is full or read-only.
        """
        if not len(rows):
            return
        starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)  # of runs of rows
        with self._writing() as handle:
            for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
                self._put(handle, int(rows[start]), vectors[start:end])

    def erase(self, rows: npt.NDArray[np.int64]) -> None:
        """Overwrite rows, in ascending order, with zeros; rows beyond the end are left out.

        Raises:
            CNClipError: the disk is read-only.
        """
        stored = rows[rows < self.rows_stored()]
        for start in range(0, len(stored), _ERASED_TOGETHER):
            part = stored[start : start + _ERASED_TOGETHER]
            self.overwrite(part, np.zeros((len(part), self.dim), DTYPE))

    def extend(self, rows: int) -> None:
        """Make the file at least ``rows`` rows long; new rows are zero.

        Raises:
            CNClipError: the disk is full or read-only.
        """
        with self._writing() as handle:
            size = os.fstat(handle).st_size
            if size < rows * self._row_bytes:
                os.ftruncate(handle, size - size % self._row_bytes)  # a part of a row
                os.ftruncate(handle, rows * self._row_bytes)

    def copy_to(self, other: VectorFile, rows: int) -> None:
        """Copy the first ``rows`` rows to a new file, in which pages of zeros take no disk space
        (on file systems that can leave them out).

        Raises:
            LibraryError: the file is shorter, or cannot be read.
            CNClipError: the disk is full or read-only.
        """
        content = self.open(rows).reshape(-1).view(np.uint8)
        with other._writing() as handle:
            os.ftruncate(handle, len(content))
            for start in range(0, len(content), _COPIED_TOGETHER):
                block = content[start : start + _COPIED_TOGETHER]
                for first, end in _used_pages(block):
                    os.lseek(handle, start + first, os.SEEK_SET)
                    _write_all(handle, block[first:end].data)

    def used(self, rows: int) -> int:
        """Return the bytes of the pages of the first ``rows`` rows that are not all zero."""
        content = self.open(rows).reshape(-1).view(np.uint8)
        return sum(
            end - first
            for start in range(0, len(content), _COPIED_TOGETHER)
            for first, end in _used_pages(content[start : start + _COPIED_TOGETHER])
        )

    def allocated(self) -> int:
        """Return the bytes that the file takes on the disk; 0 if it does not exist."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return 0
        blocks = getattr(status, "st_blocks", None)  # not on Windows
        return status.st_size if blocks is None else blocks * 512

    @contextmanager
    def _writing(self) -> Iterator[int]:
        """Yield a descriptor; sync the file at the end."""
        with map_write_errors(path_text(self.path)):
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            handle = os.open(self.path, flags, 0o666)
            try:
                yield handle
                os.fsync(handle)
            finally:
                os.close(handle)

    def _put(self, handle: int, row: int, vectors: npt.NDArray[Any]) -> None:
        if not len(vectors):
            return
        os.lseek(handle, row * self._row_bytes, os.SEEK_SET)
        _write_all(handle, np.ascontiguousarray(vectors, DTYPE).data.cast("B"))

    @property
    def _row_bytes(self) -> int:
        return self.dim * DTYPE.itemsize


def _write_all(handle: int, content: memoryview) -> None:
    while content:
        content = content[os.write(handle, content) :]


def _used_pages(block: npt.NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each run of pages that hold a byte other than zero."""
    starts = np.arange(0, len(block), _PAGE)
    used = (np.maximum.reduceat(block, starts) > 0).astype(np.int8)
    edges = np.flatnonzero(np.diff(used, prepend=np.int8(0), append=np.int8(0)))
    for first, last in edges.reshape(-1, 2).tolist():
        yield first * _PAGE, min(last * _PAGE, len(block))

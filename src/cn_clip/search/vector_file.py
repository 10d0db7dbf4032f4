"""The vectors of a library: one float16 row per image in a file that only grows."""

from __future__ import annotations

import os
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
        content = memoryview(np.ascontiguousarray(vectors, DTYPE)).cast("B")
        with map_write_errors(path_text(self.path)):
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            handle = os.open(self.path, flags, 0o666)
            try:
                os.lseek(handle, row * self._row_bytes, os.SEEK_SET)
                while content:
                    content = content[os.write(handle, content) :]
                os.fsync(handle)
            finally:
                os.close(handle)

    def erase(self, rows: npt.NDArray[np.int64]) -> None:
        """Overwrite rows with zeros."""
        zeros = np.zeros((1, self.dim), DTYPE)
        for row in rows.tolist():
            self.write(row, zeros)

    @property
    def _row_bytes(self) -> int:
        return self.dim * DTYPE.itemsize

"""int8 codes of the vectors of a library: half the bytes to scan, in files that may be deleted.

A row is coded as ``scale * code``, with the scale that maps its largest component to 127. Files in
the folder: ``codes.i8`` (N, D), ``scales.f32`` (N,), and ``codes.json``, which is written last and
says how many rows are complete. Rows are appended in place; a file that is mapped by a reader is
never shortened.

Codes are compared with the vectors when opened: those of another vector file, or damaged ones, are
not used. Wrong codes of other rows can hide a result, but never return a wrong score.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.files import read_file
from cn_clip.format_version import FIELD, Format
from cn_clip.processes import usable_cpus
from cn_clip.publish import flush, map_write_errors, write_text
from cn_clip.search.kernels import Scan, float32_of, products_with

Array = npt.NDArray[Any]

FORMAT = Format("search codes", 1)
_INT8_MAX = 127
_SAMPLE = 64  # rows compared with the vectors
_BLOCK = 1 << 14  # rows coded at a time
_DEVIATIONS = 4  # of the rounding error of a score


@dataclass(frozen=True, slots=True)
class Codes:
    """int8 codes (N, D) and float32 scales (N,) of the first rows of a vector file."""

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]

    @property
    def rows(self) -> int:
        """The number of coded rows."""
        return len(self.codes)

    @classmethod
    def open(cls, folder: Path, vectors: Array) -> Codes | None:
        """Return the codes in a folder; None if there are none for these vectors, or damaged ones.

        Args:
            folder: the cache of one vector file.
            vectors: float16 (N, D); rows after the last coded one are allowed.
        """
        try:
            about = json.loads(read_file(folder / "codes.json"))
            rows, dim = about["rows"], about["dim"]
            if about[FIELD] != str(FORMAT) or type(rows) is not int or dim != vectors.shape[1]:
                return None
            if not 0 < rows <= len(vectors):
                return None
            codes = _mapped(folder / "codes.i8", np.int8, (rows, dim))
            scales = _mapped(folder / "scales.f32", np.float32, (rows,))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return cls(codes, scales) if _agree(codes, scales, vectors) else None

    @classmethod
    def update(cls, folder: Path, vectors: Array) -> Codes | None:
        """Code the rows that are not coded yet; all, if the codes are damaged or of other vectors.

        Two processes may do so at once. A million rows of 512 take a few seconds.

        Args:
            folder: the cache of one vector file; made if missing.
            vectors: float16 (N, D).

        Returns:
            The codes of all rows; None if there are no vectors.

        Raises:
            CNClipError: the folder is not writable, or the disk is full.
        """
        codes = cls.open(folder, vectors)
        if codes is not None and codes.rows == len(vectors):
            return codes
        names = ("codes.json", "codes.i8", "scales.f32")
        with map_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if codes is None:
                for name in names:  # the JSON file first
                    (folder / name).unlink(missing_ok=True)
            _append(folder, vectors, 0 if codes is None else codes.rows)
        about = {FIELD: str(FORMAT), "rows": len(vectors), "dim": vectors.shape[1]}
        write_text(folder / names[0], json.dumps(about))
        return cls.open(folder, vectors)

    def scan(self, queries: Array) -> Scan:
        """Return a scan of the codes for queries (Q, D); it needs numkong."""
        coded, query_scales = encode(queries)
        multiply = products_with(coded)

        def score(block: slice) -> Array:
            scores = multiply(self.codes[block]).astype(np.float32)
            scores *= self.scales[block, None]
            scores *= query_scales
            return scores

        # Rounding to a step has a variance of step**2 / 12 in each component.
        step = float(np.median(self.scales[:: max(1, self.rows // 1024)]))
        length = np.linalg.norm(queries, axis=1)
        deviation = np.sqrt(((length * step) ** 2 + query_scales**2) / 12)
        return Scan(score, _DEVIATIONS * deviation)


def encode(vectors: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Return the codes (N, D) and scales (N,) of vectors (N, D); rows of zeros, and rows that are
    not finite, have the scale 0."""
    values = float32_of(vectors)
    peaks = np.maximum(values.max(axis=1, initial=0), -values.min(axis=1, initial=0))
    peaks[~np.isfinite(peaks)] = 0
    scales = peaks / _INT8_MAX
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    values *= inverse[:, None]
    values[peaks == 0] = 0
    return np.rint(values, out=values).astype(np.int8), scales


def _agree(codes: Array, scales: Array, vectors: Array) -> bool:
    """Return whether codes are those of the first rows of the vectors, on a sample."""
    sample = np.unique(np.linspace(0, len(codes) - 1, _SAMPLE).astype(np.int64))
    expected, expected_scales = encode(vectors[sample])
    return np.array_equal(codes[sample], expected) and np.array_equal(
        scales[sample], expected_scales
    )


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> Array:
    """Map the first values of a file into memory.

    Raises:
        OSError, ValueError: the file is missing or too short.
    """
    return np.memmap(path, dtype, "r", shape=shape).view(np.ndarray)


def _append(folder: Path, vectors: Array, done: int) -> None:
    """Write the codes of the rows from ``done`` into the files."""
    dim = vectors.shape[1]
    paths = (folder / "codes.i8", folder / "scales.f32")
    mode = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    streams = [os.fdopen(os.open(path, mode, 0o666), "r+b") for path in paths]
    try:
        for stream, start in zip(streams, (done * dim, done * 4), strict=True):
            stream.seek(start)
        blocks = range(done, len(vectors), _BLOCK)
        with ThreadPoolExecutor(usable_cpus()) as pool:
            for codes, scales in pool.map(lambda at: encode(vectors[at : at + _BLOCK]), blocks):
                streams[0].write(codes.data)
                streams[1].write(scales.data)
    finally:
        for stream in streams:
            stream.close()
    for path in paths:
        flush(path)

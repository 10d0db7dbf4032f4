"""Arrays out of ``.npy`` and ``.npz`` files that may be anything: damaged, hostile, or too large.

numpy believes the header: a file of 100 bytes that promises a terabyte is given a terabyte.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import DataError

_KINDS = "fiuUS"  # numbers and strings; an object would be unpickled
_MAX_RATIO = 200  # of compression, in members above _SMALL bytes; embeddings hardly compress
_SMALL = 64 << 20


def read_npy(path: str | os.PathLike[str], *, mapped: bool = False) -> npt.NDArray[Any]:
    """Read the array of a ``.npy`` file; ``mapped`` leaves its numbers on disk.

    Raises:
        DataError: it is missing or damaged, or holds anything but numbers or strings.
    """
    try:
        with Path(path).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            dtype, shape, order = _header(stream, size)
            if mapped:
                offset = stream.tell()
            else:
                return _array(stream.read(), dtype, shape, order)
        if not math.prod(shape):  # nothing cannot be mapped
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "r", offset, shape, order)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not an array (.npy): {_reason(error)}") from None


def read_npz(
    path: str | os.PathLike[str],
    names: Sequence[str],
    optional: Sequence[str] = (),
    *,
    what: str = "an .npz",
) -> dict[str, npt.NDArray[Any]]:
    """Read arrays out of an ``.npz`` file, by name; what is optional may be missing.

    ``what`` describes the file in messages.

    Raises:
        DataError: an array is missing, or as for ``read_npy``.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {each.filename: each for each in archive.infolist()}
            for name in (*names, *optional):
                if f"{name}.npy" in members:
                    found[name] = _member(archive, members[f"{name}.npy"])
                elif name in names:
                    raise ValueError(f"it has no array {name!r}")
    # zipfile and what it unpacks with raise many kinds on damaged files: BadZipFile, zlib.error,
    # NotImplementedError, RuntimeError for a password, EOFError, struct.error, ...
    except Exception as error:
        raise DataError(f"{path} is not {what}: {_reason(error)}") from None
    return found


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> npt.NDArray[Any]:
    if info.file_size > max(_SMALL, _MAX_RATIO * info.compress_size):
        raise ValueError(f"{info.filename} unfolds to {info.file_size:,} bytes; it is damaged")
    with archive.open(info) as stream:
        dtype, shape, order = _header(stream, info.file_size)
        return _array(stream.read(), dtype, shape, order)


def _header(stream: IO[bytes], size: int) -> tuple[np.dtype[Any], tuple[int, ...], Any]:
    """Read what comes before the numbers, and check that as many follow as it says."""
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(stream)
        itemsize = dtype.itemsize
    # numpy evaluates the header as a literal of Python, which may be nested, cut or none at all:
    # SyntaxError, TokenError, RecursionError, MemoryError of the parser's stack, TypeError, ...
    except Exception as error:
        raise ValueError(f"its header is damaged ({type(error).__name__})") from None
    if dtype.kind not in _KINDS:
        raise ValueError(f"it holds values of type {dtype.str}, not numbers or strings")
    if any(isinstance(each, bool) or each < 0 for each in shape):
        raise ValueError(f"its shape is {shape}")
    wanted, there = math.prod(shape) * itemsize, size - stream.tell()
    if wanted != there:
        raise ValueError(f"its shape {shape} needs {wanted:,} bytes, but {there:,} are there")
    return dtype, shape, "F" if fortran else "C"


def _array(
    raw: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], order: Any
) -> npt.NDArray[Any]:
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError("it ends too early")
    if not raw:  # frombuffer takes no empty buffer, nor items of no bytes
        return np.empty(shape, dtype)
    return np.frombuffer(raw, dtype).reshape(shape, order=order)


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    return reason or str(error) or type(error).__name__

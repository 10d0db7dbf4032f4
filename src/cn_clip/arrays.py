"""Read ``.npy`` and ``.npz`` files that may be damaged, hostile or too large.

numpy trusts the header: for a file of 100 bytes that claims a terabyte it allocates a terabyte.
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
from cn_clip.translation import _

_DTYPE_KINDS = "fiuUS"  # numbers and strings; objects would be unpickled
_MAX_COMPRESSION = 200  # embeddings hardly compress
_SMALL = 64 << 20


def read_npy(path: str | os.PathLike[str], *, mapped: bool = False) -> npt.NDArray[Any]:
    """Read the array of a ``.npy`` file; ``mapped`` maps it into memory instead.

    Raises:
        DataError: the file is missing or damaged, or holds other values than numbers or strings.
    """
    try:
        with Path(path).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            dtype, shape, order = _header(stream, size)
            if mapped:
                offset = stream.tell()
            else:
                return _array(stream.read(), dtype, shape, order)
        if not math.prod(shape):  # an empty array cannot be mapped
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "r", offset, shape, order)
    except (OSError, ValueError) as error:
        raise DataError(
            _("{path} is not an array (.npy): {reason}", path=path, reason=_reason(error))
        ) from None


def read_npz(
    path: str | os.PathLike[str],
    names: Sequence[str],
    optional: Sequence[str] = (),
    *,
    description: str = "an .npz",
) -> dict[str, npt.NDArray[Any]]:
    """Read arrays of an ``.npz`` file by name; ``optional`` ones may be missing.

    ``description`` is the expected file in messages.

    Raises:
        DataError: an array is missing, or as ``read_npy``.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            for name in (*names, *optional):
                if f"{name}.npy" in members:
                    arrays[name] = _member(archive, members[f"{name}.npy"])
                elif name in names:
                    raise ValueError(_("it has no array {name!r}", name=name))
    # zipfile and its decompressors raise many kinds on damaged files: BadZipFile, zlib.error,
    # NotImplementedError, RuntimeError for a password, EOFError, struct.error, ...
    except Exception as error:
        raise DataError(
            _(
                "{path} is not {description}: {reason}",
                path=path,
                description=description,
                reason=_reason(error),
            )
        ) from None
    return arrays


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> npt.NDArray[Any]:
    if info.file_size > max(_SMALL, _MAX_COMPRESSION * info.compress_size):
        raise ValueError(
            _(
                "{filename} decompresses to {file_size:,} bytes; it is damaged",
                filename=info.filename,
                file_size=info.file_size,
            )
        )
    with archive.open(info) as stream:
        dtype, shape, order = _header(stream, info.file_size)
        return _array(stream.read(), dtype, shape, order)


def _header(stream: IO[bytes], size: int) -> tuple[np.dtype[Any], tuple[int, ...], Any]:
    """Read the header of an array, and check it against the ``size`` of the file."""
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(stream)
        itemsize = dtype.itemsize
    # numpy evaluates the header as a Python literal; damaged ones raise SyntaxError, TokenError,
    # RecursionError, MemoryError of the parser's stack, TypeError, ...
    except Exception as error:
        raise ValueError(
            _("its header is damaged ({error_type})", error_type=type(error).__name__)
        ) from None
    if dtype.kind not in _DTYPE_KINDS:
        raise ValueError(
            _("it holds values of type {dtype}, not numbers or strings", dtype=dtype.str)
        )
    if any(isinstance(length, bool) or length < 0 for length in shape):
        raise ValueError(_("its shape is {shape}", shape=shape))
    needed, available = math.prod(shape) * itemsize, size - stream.tell()
    if needed != available:
        raise ValueError(
            _(
                "its shape {shape} needs {needed:,} bytes, but it has {available:,}",
                shape=shape,
                needed=needed,
                available=available,
            )
        )
    return dtype, shape, "F" if fortran else "C"


def _array(
    raw: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], order: Any
) -> npt.NDArray[Any]:
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(_("it ends too early"))
    if not raw:  # frombuffer refuses empty buffers and items of 0 bytes
        return np.empty(shape, dtype)
    return np.frombuffer(raw, dtype).reshape(shape, order=order)


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    return reason or str(error) or type(error).__name__

"""Arrays in one file, mapped into memory: all processes share what they read of it.

The file is a magic number, the length of a JSON header, the header, and the arrays, each at a
multiple of 64 bytes. A file is replaced atomically and never changed, as a mapping of a shortened
file ends the process.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cn_clip.errors import DataError
from cn_clip.translation import _

_MAGIC = b"cn-clip arrays 1"
_ALIGNMENT = 64
_MAX_HEADER = 64 << 20
_KINDS = "iuf"
_MAX_OPEN = 128  # mappings per process; each keeps a file descriptor


class ArrayFile:
    """The arrays of a file by name, read-only, and the JSON values stored with them."""

    def __init__(self, path: Path) -> None:
        """Map a file that ``write_arrays`` wrote.

        Raises:
            DataError: it is missing or damaged.
        """
        try:
            with path.open("rb") as stream:
                status = os.fstat(stream.fileno())
                self.state = status.st_ino, status.st_size, status.st_mtime_ns
                start, header = _read_header(stream)
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self.values: dict[str, Any] = header["values"]
            self.arrays: dict[str, npt.NDArray[Any]] = {
                name: _view(mapped, start, *layout) for name, layout in header["arrays"].items()
            }
            if status.st_size != start + header["bytes"]:
                raise ValueError(_("it ends too early"))
        # A damaged header raises many kinds: KeyError, TypeError, RecursionError, ...
        except Exception as error:
            raise DataError(
                _(
                    "{path} cannot be read: {reason}",
                    path=path,
                    reason=getattr(error, "strerror", None) or error or type(error).__name__,
                )
            ) from None

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.arrays[name]

    def get(self, name: str) -> npt.NDArray[Any] | None:
        return self.arrays.get(name)


def write_arrays(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], values: Mapping[str, Any]
) -> None:
    """Write arrays of numbers, and values of JSON, to a new file."""
    layouts: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        layouts[name] = [array.dtype.str, list(array.shape), end]
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    header = json.dumps({"values": values, "arrays": layouts, "bytes": end}).encode()
    with path.open("wb") as stream:
        stream.write(_MAGIC + len(header).to_bytes(8, "little") + header)
        for array in arrays.values():
            stream.write(bytes(-stream.tell() % _ALIGNMENT))
            stream.write(np.ascontiguousarray(array).data)
        stream.write(bytes(-stream.tell() % _ALIGNMENT))


def mapped(path: Path) -> ArrayFile:
    """Return a file that is mapped already, or map it; the least recently used are closed.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(
            _("{path} cannot be read: {reason}", path=path, reason=error.strerror)
        ) from None
    file = _open.get(path)
    if file is None or file.state != (status.st_ino, status.st_size, status.st_mtime_ns):
        file = _open[path] = ArrayFile(path)
    try:
        _open.move_to_end(path)
        while len(_open) > _MAX_OPEN:
            _open.popitem(last=False)
    except KeyError:  # another thread was here
        pass
    return file


_open: OrderedDict[Path, ArrayFile] = OrderedDict()


def smallest(array: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Return whole numbers in the smallest type that holds them all."""
    low, high = (int(array.min()), int(array.max())) if len(array) else (0, 0)
    names = ("u1", "u2", "u4", "u8") if low >= 0 else ("i1", "i2", "i4", "i8")
    fits = (t for t in map(np.dtype, names) if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
    return array.astype(next(fits))


def string_arrays(name: str, strings: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """Return strings as arrays: their bytes, and their ends unless all are equally long."""
    raw = [string.encode() for string in strings]
    arrays: dict[str, npt.NDArray[Any]] = {name: np.frombuffer(b"".join(raw), np.uint8)}
    if len(set(map(len, raw))) > 1:
        arrays[f"{name}_ends"] = smallest(np.cumsum([len(each) for each in raw]))
    return arrays


def strings(arrays: ArrayFile, name: str, count: int) -> Iterator[str]:
    """Yield the ``count`` strings that ``string_arrays`` stored."""
    raw, ends = arrays[name].tobytes(), arrays.get(f"{name}_ends")
    if ends is None:
        ends = np.arange(1, count + 1) * (len(raw) // max(1, count))
    start = 0
    for end in ends.tolist():
        yield raw[start:end].decode()
        start = end


def _read_header(stream: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Return the offset of the arrays, and the header."""
    head = stream.read(24)
    if head[:16] != _MAGIC:
        raise ValueError(_("it is not a file of arrays of this version"))
    length = int.from_bytes(head[16:24], "little")
    if length > _MAX_HEADER:
        raise ValueError(_("its header claims {size:,} bytes", size=length))
    return -(-(24 + length) // _ALIGNMENT) * _ALIGNMENT, json.loads(stream.read(length))


def _view(
    mapped: mmap.mmap, start: int, dtype: str, shape: list[int], offset: int
) -> npt.NDArray[Any]:
    kind = np.dtype(dtype)
    if kind.kind not in _KINDS or offset < 0 or any(length < 0 for length in shape):
        raise ValueError(_("its header is damaged ({error_type})", error_type=dtype))
    count = math.prod(shape)
    if not count:  # an offset at the end of the file is refused
        return np.empty(shape, kind)
    return np.frombuffer(mapped, kind, count, start + offset).reshape(shape)

"""Files of shards: on this machine, or behind a URL (see ``remote``)."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from cn_clip.errors import UnavailableError
from cn_clip.files import check_regular
from cn_clip.text import path_text
from cn_clip.translation import _


class FileState(NamedTuple):
    """What tells a changed file: its size in bytes, and its version.

    The version is the time of the last change in nanoseconds, or a digest of the ETag. It is
    compared for equality alone, so clocks of several hosts need not agree.
    """

    size: int
    version: int


class ShardFile(Protocol):
    """A file that is read at offsets, from any process; instances are pickled to workers."""

    name: str
    """Path or URL, as valid text."""
    short_name: str
    """Last part of the name."""
    identity: bytes
    """Distinguishes the file from all others."""

    def state(self) -> FileState:
        """Return the present state.

        Raises:
            DataError: the file cannot be read.
        """
        ...

    def read(self, state: FileState, offset: int, length: int) -> bytes:
        """Read bytes at an offset of the file in the given state; fewer at its end.

        Raises:
            DataError: the file cannot be read, or is in another state.
        """
        ...

    def read_ahead(self, offset: int, length: int) -> None:
        """Start to read a part that will be needed, without waiting for it."""
        ...

    def open(self, state: FileState) -> BinaryIO:
        """Open the file in the given state for reading in sequence; errors as of ``read``."""
        ...


class LocalFile:
    """A file on this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name, self.short_name = path_text(path), path.name
        self.identity = os.fsencode(os.path.realpath(path))

    def state(self) -> FileState:
        try:
            check_regular(self.path)
            return file_state(self.path.stat())
        except OSError as error:
            raise _unreadable(self.name, error) from None

    def read(self, state: FileState, offset: int, length: int) -> bytes:
        # Opening the file costs about 10 us, 1 % of decoding an image, and there is no file object
        # to share between threads and processes.
        with self.open(state) as stream:
            try:
                stream.seek(offset)
                return stream.read(length)
            except OSError as error:
                raise _unreadable(self.name, error) from None

    def read_ahead(self, offset: int, length: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError), self.path.open("rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), offset, length, os.POSIX_FADV_WILLNEED)

    def open(self, state: FileState) -> BinaryIO:
        try:
            stream = self.path.open("rb", buffering=0)
        except OSError as error:
            raise _unreadable(self.name, error) from None
        if file_state(os.fstat(stream.fileno())) != state:
            stream.close()
            raise UnavailableError(changed_message(self.name))
        return stream


class ReadAt(io.RawIOBase):
    """A stream over a file that is read at offsets."""

    def __init__(self, file: ShardFile, state: FileState) -> None:
        self._file, self._state, self._at = file, state, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._state.size}
        self._at = max(0, bases[whence] + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._file.read(self._state, self._at, len(buffer))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def file_state(status: os.stat_result) -> FileState:
    return FileState(status.st_size, status.st_mtime_ns)


def changed_message(name: str) -> str:
    return _("{path} has changed since it was opened; start again", path=name)


def _unreadable(name: str, error: OSError) -> UnavailableError:
    return UnavailableError(_("{path} cannot be read: {reason}", path=name, reason=error.strerror))

"""The state of a file, by which an index knows that its file has changed."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cn_clip.errors import DataError
from cn_clip.text import path_text
from cn_clip.translation import _


class FileState(NamedTuple):
    """Size in bytes and time of the last change. Times are compared for equality alone, so clocks
    of several hosts need not agree."""

    size: int
    mtime_ns: int


def file_state(status: os.stat_result) -> FileState:
    return FileState(status.st_size, status.st_mtime_ns)


def changed_message(path: Path) -> str:
    return _("{path} has changed since it was opened; start again", path=path_text(path))


def read_unchanged(path: Path, state: FileState, offset: int, length: int) -> bytes:
    """Read ``length`` bytes at an offset of a file that is in the given state.

    Raises:
        DataError: the file cannot be read, or is in another state.
    """
    try:
        with path.open("rb", buffering=0) as stream:
            if file_state(os.fstat(stream.fileno())) != state:
                raise DataError(changed_message(path))
            stream.seek(offset)
            return stream.read(length)
    except OSError as error:
        raise DataError(
            _("{path} cannot be read: {reason}", path=path_text(path), reason=error.strerror)
        ) from None


def advise(path: Path, offset: int, length: int) -> None:
    """Ask the system to read a part of a file into memory; where it cannot be asked, do nothing."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), path.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), offset, length, os.POSIX_FADV_WILLNEED)

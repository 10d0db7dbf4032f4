"""Where indexes of large files are kept, so that they are built once."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

from cn_clip.errors import CNClipError
from cn_clip.publish import published

_Index = TypeVar("_Index")
_VARIABLE = "CN_CLIP_CACHE"


def cached(
    path: Path, suffix: str, write: Callable[[Path], None], read: Callable[[Path], _Index]
) -> _Index:
    """Return what ``read`` makes of a file's index; ``write`` builds it unless it is there.

    Indexes lie in ``$CN_CLIP_CACHE``, by default ``~/.cache/cn_clip``; they can be deleted. Where
    that cannot be written, they go into a temporary folder that ends with the process. An index
    that cannot be read is built anew.

    Args:
        path: the file, which must exist; another index is built once it has changed.
        suffix: tells indexes of one file apart.
        write: writes the index at a path; raises ``OSError`` only if that cannot be written.
        read: reads it, and raises if it is damaged.

    Raises:
        CNClipError: no place can be written; or what ``write`` raises.
    """
    name = _name(path, suffix)
    failed: list[str] = []
    for root in _roots(failed):
        place = root / "index" / name
        try:
            if place.is_file():
                return read(place)
        except Exception:  # our own file, cut or overwritten: its readers raise many kinds
            pass
        try:
            with published(place) as temporary:
                write(temporary)
            return read(place)
        except OSError as error:
            failed.append(f"{root} ({error.strerror or error})")
    raise CNClipError(
        f"the index of {path.name} cannot be written: {'; '.join(failed)}; name another folder "
        f"with {_VARIABLE}"
    )


def _name(path: Path, suffix: str) -> str:
    found = path.stat()
    state = os.fsencode(os.path.realpath(path)) + f"\0{found.st_size}\0{found.st_mtime_ns}".encode()
    digest = hashlib.blake2b(state, digest_size=8).hexdigest()
    return f"{path.name[:40]}-{digest}{suffix}"


def _roots(failed: list[str]) -> Iterator[Path]:
    """Yield the folders to try; the second one is a way out, and says so."""
    given = os.environ.get(_VARIABLE)
    try:
        yield Path(given or "~/.cache/cn_clip").expanduser()
    except RuntimeError:  # no HOME, and a user without an entry in the list of users
        failed.append("the home folder (there is none)")
    if not given:
        try:
            root = _temporary(failed[0])
        except OSError:
            failed.append("the temporary folder (there is none)")
        else:
            yield root


@cache
def _temporary(failed: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="cn_clip-"))
    warnings.warn(
        f"cannot write {failed}; indexes of tar and Parquet files are kept in {folder} until this "
        f"process ends. Name a lasting folder with {_VARIABLE}",
        stacklevel=2,
    )
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a fork, whose parent still reads it
        shutil.rmtree(folder, ignore_errors=True)

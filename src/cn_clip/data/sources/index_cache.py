"""A cache of the indexes of large files."""

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

from cn_clip.cache import VARIABLE, cache_folder
from cn_clip.errors import CNClipError, UsageError
from cn_clip.publish import atomic_file
from cn_clip.translation import _

_Index = TypeVar("_Index")


def cached_index(
    path: Path, suffix: str, write: Callable[[Path], None], read: Callable[[Path], _Index]
) -> _Index:
    """Read the index of a file; build it first if it is missing or damaged.

    Indexes are in ``$CN_CLIP_CACHE``, by default ``~/.cache/cn_clip``; they may be deleted. If that
    folder is not writable, a temporary folder is used until the process ends.

    Args:
        path: an existing file; its index is built again after it changed.
        suffix: distinguishes several indexes of one file.
        write: writes the index to a path; raises ``OSError`` only if the path is not writable.
        read: reads the index; raises if it is damaged.

    Raises:
        CNClipError: no folder is writable; or any error of ``write``.
    """
    name = _name(path, suffix)
    failed: list[str] = []
    for root in _cache_roots(failed):
        index = root / "index" / name
        try:
            if index.is_file():
                return read(index)
        except Exception:  # parsers of a damaged index raise many kinds
            pass
        try:
            with atomic_file(index) as temporary:
                write(temporary)
            return read(index)
        except OSError as error:
            failed.append(f"{root} ({error.strerror or error})")
    raise CNClipError(
        _(
            "the index of {name} cannot be written: {failed}; set another folder with {variable}",
            name=path.name,
            failed="; ".join(failed),
            variable=VARIABLE,
        )
    )


def _name(path: Path, suffix: str) -> str:
    status = path.stat()
    state = os.fsencode(os.path.realpath(path))
    state += f"\0{status.st_size}\0{status.st_mtime_ns}".encode()
    digest = hashlib.blake2b(state, digest_size=8).hexdigest()
    return f"{path.name[:40]}-{digest}{suffix}"


def _cache_roots(failed: list[str]) -> Iterator[Path]:
    """Yield the folders to try: the cache, then a temporary folder, with a warning."""
    given = os.environ.get(VARIABLE)
    try:
        yield cache_folder()
    except UsageError:  # no HOME, and the user has no passwd entry
        failed.append(_("the home folder (there is none)"))
    if not given:
        try:
            root = _temporary_root(failed[0])
        except OSError:
            failed.append(_("the temporary folder (there is none)"))
        else:
            yield root


@cache
def _temporary_root(failed: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="cn_clip-"))
    warnings.warn(
        _(
            "cannot write {failed}; indexes of tar and Parquet files are kept in {folder} until "
            "this process ends. Set a permanent folder with {variable}",
            failed=failed,
            folder=folder,
            variable=VARIABLE,
        ),
        stacklevel=2,
    )
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a forked worker
        shutil.rmtree(folder, ignore_errors=True)

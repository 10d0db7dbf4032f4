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
from cn_clip.data.sources.shard_file import FileState, ShardFile
from cn_clip.errors import CNClipError, UsageError
from cn_clip.publish import atomic_file
from cn_clip.translation import _

_Index = TypeVar("_Index")


def cached_index(
    file: ShardFile,
    state: FileState,
    suffix: str,
    write: Callable[[Path], None],
    read: Callable[[Path], _Index],
) -> _Index:
    """Read the index of a file; build it first if it is missing or damaged.

    Indexes are in ``$CN_CLIP_CACHE``, by default ``~/.cache/cn_clip``; they may be deleted. If that
    folder is not writable, a temporary folder is used until the process ends.

    Args:
        file: the file.
        state: its state; the index is built again after it changed.
        suffix: distinguishes several indexes of one file.
        write: writes the index to a path; raises ``OSError`` only if the path is not writable.
        read: reads the index; raises if it is damaged.

    Raises:
        CNClipError: no folder is writable; or any error of ``write``.
    """
    name = index_name(file.short_name, file.identity, state)
    return named_index(file.short_name, name + suffix, write, read)


def named_index(
    label: str, name: str, write: Callable[[Path], None], read: Callable[[Path], _Index]
) -> _Index:
    """Read the index of a name; build it first if it is missing or damaged. See ``cached_index``.

    Args:
        label: the file that it is the index of, for messages.
        name: of the index, from ``index_name``, with a suffix.
    """

    def read_or_write(folder: Path) -> _Index:
        index = folder / name
        try:
            if index.is_file():
                return read(index)
        except Exception:  # parsers of a damaged index raise many kinds
            pass
        with atomic_file(index) as temporary:
            write(temporary)
        return read(index)

    return in_index_folder(label, read_or_write)


def in_index_folder(name: str, use: Callable[[Path], _Index]) -> _Index:
    """Call ``use`` with the folder of indexes; with another if it raises an ``OSError``.

    Args:
        name: what the indexes are of, for messages.
        use: reads and writes files of the folder, which may be missing; raises ``OSError`` only if
            the folder is not writable.

    Raises:
        CNClipError: no folder is writable; or any error of ``use``.
    """
    failed: list[str] = []
    for root in _cache_roots(failed):
        try:
            return use(root / "index")
        except OSError as error:
            failed.append(f"{root} ({error.strerror or error})")
    raise CNClipError(
        _(
            "the index of {name} cannot be written: {failed}; set another folder with {variable}",
            name=name,
            failed="; ".join(failed),
            variable=VARIABLE,
        )
    )


def index_name(label: str, identity: bytes, state: FileState) -> str:
    """Return the name of the index of a file in a state."""
    identity += f"\0{state.size}\0{state.version}".encode()
    return f"{label[:40]}-{hashlib.blake2b(identity, digest_size=8).hexdigest()}"


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

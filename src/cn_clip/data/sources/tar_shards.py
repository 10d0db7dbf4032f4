"""The shards of a source: indexed in parallel, and opened by a table of their sizes.

The table spares opening the index of every shard: thousands of shards are opened in the time of
asking the file system for their state.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from cn_clip.data.process_map import Progress, no_progress, parallel_map
from cn_clip.data.sources.array_file import ArrayFile, write_arrays
from cn_clip.data.sources.base import Source
from cn_clip.data.sources.file_state import FileState, file_state
from cn_clip.data.sources.index_cache import in_index_folder
from cn_clip.data.sources.tar import Tar
from cn_clip.errors import DataError
from cn_clip.publish import atomic_file
from cn_clip.text import path_text
from cn_clip.translation import _

_FEW = 8  # shards that are indexed in this process, as starting others takes longer
_PATIENCE = 3.0  # seconds before a process says what it waits for

_Known = tuple[FileState, int]
"""The state of a shard, and how many pairs it has."""


def open_tars(
    paths: Sequence[Path], *, workers: int = 0, on_progress: Progress = no_progress
) -> list[Source]:
    """Open tar shards; those without an index are indexed first.

    Of several processes that open the same shards and share the cache folder, one indexes them.

    Args:
        paths: the shards.
        workers: processes that index; 0 indexes in this process.
        on_progress: called with (done, total) shards while they are indexed.

    Raises:
        DataError: a shard is damaged or has no pair.
        CNClipError: the indexes cannot be written.
    """
    for path in paths:
        check_no_folder(path, "tar")
    if len(paths) == 1:
        return [Tar(paths[0])]
    known = in_index_folder(
        paths[0].name, lambda folder: _known_shards(folder, paths, workers, on_progress)
    )
    return [Tar(path, known=entry) for path, entry in zip(paths, known, strict=True)]


def check_no_folder(path: Path, kind: str) -> None:
    """Raise a ``DataError`` if the path of a source of files is a folder."""
    if path.is_dir():
        name = path_text(f"{kind}:{path}")
        raise DataError(
            _("{name} is a folder; give the files in it: {name}/*.{kind}", name=name, kind=kind)
        )


def _known_shards(
    folder: Path, paths: Sequence[Path], workers: int, on_progress: Progress
) -> list[_Known]:
    """Return what is known of each shard, after indexing the new ones."""
    joined = b"\0".join(os.fsencode(os.path.abspath(path)) for path in paths)
    table = folder / f"{hashlib.blake2b(joined, digest_size=8).hexdigest()}.3.table"
    known = _read_table(table, paths)
    if None in known:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(table.with_suffix(".lock")):
            known = _read_table(table, paths)  # another process may have indexed them
            _index_missing(paths, known, workers, on_progress)
            _write_table(table, [entry for entry in known if entry is not None])
    return [entry for entry in known if entry is not None]


def _index_missing(
    paths: Sequence[Path], known: list[_Known | None], workers: int, on_progress: Progress
) -> None:
    missing = [number for number, entry in enumerate(known) if entry is None]
    on_progress(len(paths) - len(missing), len(paths))
    few = len(missing) <= _FEW
    with parallel_map(_index, 0 if few or workers == 1 else workers) as run:
        indexed = run([paths[number] for number in missing])
        for done, (number, entry) in enumerate(zip(missing, indexed, strict=True), 1):
            known[number] = entry
            on_progress(len(paths) - len(missing) + done, len(paths))


def _index(path: Path) -> _Known:
    shard = Tar(path)
    return shard.state, len(shard)


def _read_table(table: Path, paths: Sequence[Path]) -> list[_Known | None]:
    """Return what the table has of each shard; None for a shard that is new or has changed."""
    known: list[_Known | None] = [None] * len(paths)
    try:
        shards = ArrayFile(table)
        columns = [shards[name].tolist() for name in ("size", "mtime_ns", "pairs")]
        rows = list(zip(paths, *columns, strict=True))
    except (DataError, KeyError, ValueError):  # missing or damaged
        return known
    for number, (path, size, mtime_ns, pairs) in enumerate(rows):
        try:
            state = file_state(os.stat(path))
        except OSError:  # reported when it is opened
            continue
        if state == FileState(size, mtime_ns):
            known[number] = FileState(size, mtime_ns), pairs
    return known


def _write_table(table: Path, known: Sequence[_Known]) -> None:
    columns = {
        "size": [state.size for state, _pairs in known],
        "mtime_ns": [state.mtime_ns for state, _pairs in known],
        "pairs": [pairs for _state, pairs in known],
    }
    with atomic_file(table) as temporary:
        write_arrays(
            temporary, {name: np.array(column, np.int64) for name, column in columns.items()}, {}
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock; on a file system without locks, every process goes on."""
    lock = FileLock(path, timeout=_PATIENCE)
    try:
        try:
            lock.acquire()
        except Timeout:
            warnings.warn(
                _("waiting until another process has indexed the shards ({path})", path=path),
                stacklevel=2,
            )
            lock.acquire(timeout=-1)
    except NotImplementedError:
        yield
        return
    try:
        yield
    finally:
        lock.release()

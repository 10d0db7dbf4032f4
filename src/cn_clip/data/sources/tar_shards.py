"""The shards of a source: indexed in parallel, and opened by a table of their sizes.

The table spares opening the index of every shard: thousands of shards are opened in the time of
asking the file system for their state.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from cn_clip.data.process_map import Progress, no_progress, parallel_map
from cn_clip.data.sources.array_file import ArrayFile, write_arrays
from cn_clip.data.sources.base import Source
from cn_clip.data.sources.index_cache import in_index_folder
from cn_clip.data.sources.shard_file import FileState, LocalFile, ShardFile, changed_message
from cn_clip.data.sources.tar import Tar
from cn_clip.errors import DataError
from cn_clip.publish import atomic_file
from cn_clip.text import path_text
from cn_clip.translation import _

_FEW = 8  # shards that are indexed in this process, as starting others takes longer
_DAMAGED = -1  # instead of a number of pairs
_PATIENCE = 3.0  # seconds before a process says what it waits for


def open_tars(
    files: Sequence[ShardFile],
    *,
    unpaired: bool = False,
    skip_damaged: bool = False,
    workers: int = 0,
    on_progress: Progress = no_progress,
) -> tuple[list[Source], list[str]]:
    """Open tar shards; those without an index are indexed first.

    Of several processes that open the same shards and share the cache folder, one indexes them.

    Args:
        files: the shards.
        unpaired: whether images without a text are rows.
        skip_damaged: leave damaged shards out.
        workers: processes that index; 0 indexes in this process.
        on_progress: called with (done, total) shards while they are indexed.

    Returns:
        The shards, and a message for each that is left out.

    Raises:
        DataError: a shard is damaged or has no pair; all others are indexed.
        CNClipError: the indexes cannot be written.
    """
    for file in files:
        if isinstance(file, LocalFile):
            check_no_folder(file.path, "tar")
    if len(files) == 1:
        return [Tar(files[0], unpaired=unpaired)], []
    states = [file.state() for file in files]
    counts = in_index_folder(
        files[0].short_name,
        lambda folder: _pair_counts(folder, files, states, unpaired, workers, on_progress),
    )
    damaged = [number for number, pairs in enumerate(counts) if pairs == _DAMAGED]
    if damaged and (not skip_damaged or len(damaged) == len(files)):
        _raise_first(files, states, damaged, unpaired=unpaired)
    parts = [
        Tar(file, state=state, pairs=pairs, unpaired=unpaired)
        for file, state, pairs in zip(files, states, counts, strict=True)
        if pairs != _DAMAGED
    ]
    left_out = [
        _("{path} is damaged or has no pair, and is left out", path=files[number].name)
        for number in damaged
    ]
    return list(parts), left_out


def _raise_first(
    files: Sequence[ShardFile],
    states: Sequence[FileState],
    damaged: Sequence[int],
    *,
    unpaired: bool,
) -> None:
    """Raise the error of the first damaged shard, with the number of all."""
    try:
        Tar(files[damaged[0]], state=states[damaged[0]], unpaired=unpaired)
    except DataError as error:
        if len(damaged) == 1:
            raise
        raise DataError(
            _(
                "{count:,} of {total:,} shards are damaged; ?damaged=skip leaves them out. The "
                "first: {error}",
                count=len(damaged),
                total=len(files),
                error=error,
            )
        ) from None
    raise DataError(changed_message(files[damaged[0]].name))


def check_no_folder(path: Path, kind: str) -> None:
    """Raise a ``DataError`` if the path of a source of files is a folder."""
    if path.is_dir():
        name = path_text(f"{kind}:{path}")
        raise DataError(
            _("{name} is a folder; give the files in it: {name}/*.{kind}", name=name, kind=kind)
        )


def _pair_counts(
    folder: Path,
    files: Sequence[ShardFile],
    states: Sequence[FileState],
    unpaired: bool,
    workers: int,
    on_progress: Progress,
) -> list[int]:
    """Return the number of pairs of each shard, or ``_DAMAGED``, after indexing the new ones."""
    joined = b"\0".join(file.identity for file in files)
    suffix = ".unpaired.3.table" if unpaired else ".3.table"
    table = folder / f"{hashlib.blake2b(joined, digest_size=8).hexdigest()}{suffix}"
    counts = _read_table(table, states)
    if None in counts:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(table.with_suffix(".lock")):
            counts = _read_table(table, states)  # another process may have indexed them
            missing = [number for number, pairs in enumerate(counts) if pairs is None]
            jobs = [(files[number], states[number], unpaired) for number in missing]
            few = len(missing) <= _FEW or workers == 1
            on_progress(len(files) - len(missing), len(files))
            with parallel_map(_index, 0 if few else workers) as run:
                for done, (number, pairs) in enumerate(zip(missing, run(jobs), strict=True), 1):
                    counts[number] = pairs
                    on_progress(len(files) - len(missing) + done, len(files))
            _write_table(table, states, [pairs for pairs in counts if pairs is not None])
    return [pairs for pairs in counts if pairs is not None]


def _index(job: tuple[ShardFile, FileState, bool]) -> int:
    file, state, unpaired = job
    try:
        return len(Tar(file, state=state, unpaired=unpaired))
    except DataError:
        return _DAMAGED


def _read_table(table: Path, states: Sequence[FileState]) -> list[int | None]:
    """Return what the table has of each shard; None for a shard that is new or has changed."""
    try:
        shards = ArrayFile(table)
        columns = [shards[name].tolist() for name in ("size", "version", "pairs")]
        rows = list(zip(states, *columns, strict=True))
    except (DataError, KeyError, ValueError):  # missing or damaged
        return [None] * len(states)
    return [pairs if state == (size, version) else None for state, size, version, pairs in rows]


def _write_table(table: Path, states: Sequence[FileState], counts: Sequence[int]) -> None:
    columns = {
        "size": [state.size for state in states],
        "version": [state.version for state in states],
        "pairs": counts,
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

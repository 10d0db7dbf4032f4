"""What a check has finished of tar shards, kept in the cache until the check ends."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from cn_clip import __version__
from cn_clip.arrays import read_npz
from cn_clip.cache import cache_folder
from cn_clip.data.process_map import chunked
from cn_clip.data.sources.base import Source
from cn_clip.data.sources.open import parts_of
from cn_clip.data.sources.tar import Tar
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.publish import atomic_file
from cn_clip.translation import shown_language

_FOLDER = "checks"
_CHUNK = 128  # rows or images of a job


class Batch(Protocol):
    """Results of a job, which can be joined, and kept in arrays."""

    @classmethod
    def joined(cls, batches: Sequence[Self]) -> Self: ...

    def to_arrays(self) -> Mapping[str, npt.NDArray[Any]]: ...

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self: ...

    @classmethod
    def names(cls) -> Sequence[str]: ...


_Batch = TypeVar("_Batch", bound=Batch)
Run = Callable[[Sequence[npt.NDArray[np.int64]]], Iterator[_Batch]]


class KeptShards:
    """The shards of a source, and what was finished of each by a check that was interrupted."""

    def __init__(self, source: Source, *, hashed: bool) -> None:
        """Look for what is kept.

        Args:
            source: from ``open_source``.
            hashed: whether its images are hashed.
        """
        self._parts, self._hashed = parts_of(source), hashed
        self._bounds = np.cumsum([0, *map(len, self._parts)])
        name = hashlib.blake2b(source.name.encode(errors="surrogateescape"), digest_size=16)
        try:
            self._folder: Path | None = cache_folder() / _FOLDER / name.hexdigest()
        except UsageError:  # no home folder
            self._folder = None

    def batches(
        self, run: Run[_Batch], kind: type[_Batch], indexes: npt.NDArray[np.int64]
    ) -> Iterator[_Batch]:
        """Yield the results of rows in order: of each shard at once, of another file by chunks.

        Args:
            run: maps a function over chunks of indexes.
            kind: of its results.
            indexes: of the rows (N,), ascending.
        """
        ends = np.searchsorted(indexes, self._bounds)
        rows = [indexes[start:stop] for start, stop in pairwise(ends)]
        places = [self._place(number, kind, own) for number, own in enumerate(rows)]
        kept = [place is not None and place.exists() for place in places]
        missing = [own for own, is_kept in zip(rows, kept, strict=True) if not is_kept]
        results = run([chunk for own in missing for chunk in chunked(own, _CHUNK)])
        for own, place, is_kept in zip(rows, places, kept, strict=True):
            chunks = chunked(own, _CHUNK)
            if place is None:
                yield from (next(results) for _chunk in chunks)
            elif not chunks:
                continue
            elif is_kept:
                yield _read(place, kind) or kind.joined(list(run(chunks)))
            else:
                batch = kind.joined([next(results) for _chunk in chunks])
                _write(place, batch)
                yield batch

    def discard(self) -> None:
        """Remove all that is kept."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _place(self, number: int, kind: type[Batch], indexes: npt.NDArray[np.int64]) -> Path | None:
        """Return the file of what a shard gave, named by all that it depends on."""
        part = self._parts[number]
        if self._folder is None or not isinstance(part, Tar):
            return None
        key = [
            __version__,
            shown_language(),
            kind.__name__,
            self._hashed,
            os.fsdecode(part.file.identity),
            part.state,
            hashlib.blake2b(indexes.tobytes()).hexdigest(),
        ]
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16)
        return self._folder / f"{digest.hexdigest()}.npz"


def _read(place: Path, kind: type[_Batch]) -> _Batch | None:
    try:
        return kind.of_arrays(read_npz(place, kind.names()))
    except (DataError, OSError, ValueError, LookupError):  # damaged, or removed meanwhile
        return None


def _write(place: Path, batch: Batch) -> None:
    with suppress(OSError, CNClipError):  # without it, an interrupted check reads the shard again
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(place) as temporary, temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **batch.to_arrays())

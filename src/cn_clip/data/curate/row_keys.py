"""The keys of all rows of a source, from its indexes, or read in worker processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cn_clip.data.process_map import Workers, chunked, parallel_map
from cn_clip.data.sources.base import Source
from cn_clip.data.sources.open import parts_of
from cn_clip.data.sources.row_index import index_of
from cn_clip.data.sources.row_keys import caption_key, image_key
from cn_clip.errors import DataError

_CHUNK = 4096


@dataclass(slots=True)
class SourceKeys:
    """The keys of N rows.

    Attributes:
        images: uint64 (N,), of the images (see ``image_key``); any value for unreadable rows.
        captions: uint64 (N,), of the captions (see ``caption_key``); 0 for unreadable rows.
        errors: index of each unreadable row -> message, in order.
    """

    images: npt.NDArray[np.uint64]
    captions: npt.NDArray[np.uint64]
    errors: dict[int, str]


def keys_of_source(source: Source, *, workers: Workers = 0) -> SourceKeys:
    """Return the keys of all rows; those of shards with an index are not read.

    Args:
        source: from ``open_source``.
        workers: that read the other rows; 0 reads in this process.

    Raises:
        DataError: a worker died.
    """
    keys = SourceKeys(np.zeros(len(source), np.uint64), np.zeros(len(source), np.uint64), {})
    first = 0
    few = len(source) <= 2 * _CHUNK
    with parallel_map(_ReadKeys(source), 0 if few else workers) as run:
        for number, part in enumerate(parts_of(source)):
            stop = first + len(part)
            rows = range(first, stop)
            if (own := index_of(part, workers=workers)) is not None:
                keys.images[first:stop] = own.image_keys(number, first)
                keys.captions[first:stop] = own.captions()
                unreadable = first + np.flatnonzero(own.lengths() == 0)
                jobs = [_Rows(number, unreadable.tolist())] if len(unreadable) else []
            else:
                jobs = [_Rows(number, list(chunk)) for chunk in chunked(rows, _CHUNK)]
            for job, read in zip(jobs, run(jobs), strict=True):
                for at, (index, row) in enumerate(zip(job.indexes, read.errors, strict=True)):
                    if row:
                        keys.errors[index] = row
                    else:
                        keys.images[index] = read.images[at]
                        keys.captions[index] = read.captions[at]
            first = stop
    return keys


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one file of a source, by their indexes in the source."""

    part: int
    indexes: list[int]


@dataclass(frozen=True, slots=True)
class _Keys:
    images: npt.NDArray[np.uint64]
    captions: npt.NDArray[np.uint64]
    errors: list[str]
    """Why each row is unreadable; empty if it is not."""


@dataclass(frozen=True, slots=True)
class _ReadKeys:
    """Reads rows, in a worker process."""

    source: Source

    def __call__(self, job: _Rows) -> _Keys:
        images, captions = (np.zeros(len(job.indexes), np.uint64) for _ in range(2))
        errors = []
        for at, index in enumerate(job.indexes):
            try:
                row = self.source.row(index)
            except DataError as error:
                errors.append(str(error))
                continue
            images[at], captions[at] = image_key(job.part, row.image_id), caption_key(row.text)
            errors.append("")
        return _Keys(images, captions, errors)

"""Images that must stay together in a split: near-duplicates, and images with an equal caption."""

from __future__ import annotations

from dataclasses import dataclass
from tempfile import TemporaryFile

import numpy as np
import numpy.typing as npt

from cn_clip.data.captions import digest, plain
from cn_clip.data.curate.check_images import ReadImages
from cn_clip.data.curate.grouping import RowGroups, connected, first_equal, group_rows
from cn_clip.data.curate.near_duplicates import near_duplicates
from cn_clip.data.process_map import Progress, chunked, no_progress, parallel_map
from cn_clip.data.sources.base import Source
from cn_clip.data.sources.open import id_digest
from cn_clip.errors import DataError
from cn_clip.translation import _

_ROWS, _IMAGES = 4096, 128  # of a worker's job
_NO_LINKS = np.empty((2, 0), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class LeakGroups:
    """The M usable images of a source, in groups.

    Attributes:
        rows: the pairs of each image.
        keys: uint64 (M,), of the images' ids.
        groups: int64 (M,), the first image of each image's group.
        near_duplicates: number of images that look like an earlier one.
        equal_captions: number of captions that several images have.
        skipped: a message for each pair without a readable row, caption or image.
    """

    rows: RowGroups
    keys: npt.NDArray[np.uint64]
    groups: npt.NDArray[np.int64]
    near_duplicates: int
    equal_captions: int
    skipped: list[str]


@dataclass(frozen=True, slots=True)
class _Keys:
    """The keys of N rows: of their images and captions, 0 if the caption is short; why each row is
    not usable, empty if it is."""

    images: npt.NDArray[np.uint64]
    captions: npt.NDArray[np.uint64]
    errors: list[str]


def group_leaks(
    source: Source,
    *,
    threshold: int,
    min_caption: int,
    workers: int = 0,
    on_progress: Progress = no_progress,
) -> LeakGroups:
    """Group the images of a source by what would leak from one side of a split to the other.

    Args:
        source: from ``open_source``.
        threshold: maximum differing bits of the 256-bit hashes of near-duplicates; 0 compares no
            images, and reads none.
        min_caption: captions with fewer characters, punctuation excluded, are not compared; 0
            compares none.
        workers: number of worker processes; 0 runs in this process.
        on_progress: called with (done, total) images.

    Raises:
        DataError: a worker died.
    """
    keys = _read_keys(source, min_caption, workers)
    usable = np.array([not error for error in keys.errors], dtype=bool)
    rows = np.flatnonzero(usable)
    hashed = _compare_images(
        source, group_rows(rows, keys.images[rows]).firsts, threshold, workers, on_progress
    )
    usable &= np.isin(keys.images, keys.images[hashed.indexes])
    rows = np.flatnonzero(usable)
    images = group_rows(rows, keys.images[rows])  # in the order of ``hashed``
    same_text = _equal_captions(images, keys.captions)
    links = np.concatenate([hashed.links, same_text.links], axis=1)
    return LeakGroups(
        images,
        keys.images[images.firsts],
        connected(len(images), links),
        len(np.unique(hashed.links[0])),
        same_text.captions,
        [*filter(None, keys.errors), *hashed.errors],
    )


@dataclass(frozen=True, slots=True)
class _Compared:
    """The first pairs of M images; numbers of near-duplicates among them, later and earlier,
    (2, K); a message for each unreadable image."""

    indexes: npt.NDArray[np.int64]
    links: npt.NDArray[np.int64]
    errors: list[str]


def _compare_images(
    source: Source,
    firsts: npt.NDArray[np.int64],
    threshold: int,
    workers: int,
    on_progress: Progress,
) -> _Compared:
    if not threshold:
        return _Compared(firsts, _NO_LINKS, [])
    indexes, errors = [np.empty(0, np.int64)], []
    done = 0
    with TemporaryFile() as hashes:
        with parallel_map(ReadImages(source, hashed=True), workers) as run:
            for batch in run(chunked(firsts, _IMAGES)):
                indexes.append(batch.indexes)
                hashes.write(batch.hashes.tobytes())
                errors += [error for _unused, error in batch.errors]
                done += len(batch.indexes) + len(batch.errors)
                on_progress(done, len(firsts))
        readable = np.concatenate(indexes)
        links = _NO_LINKS
        if len(readable) > 1:
            links = np.stack(near_duplicates(hashes, len(readable), threshold))
    return _Compared(readable, links, errors)


def _read_keys(source: Source, min_caption: int, workers: int) -> _Keys:
    jobs = chunked(range(len(source)), _ROWS)
    read = _ReadKeys(source, min_caption)
    with parallel_map(read, workers if len(jobs) > 2 else 0) as run:
        parts = list(run(jobs))
    return _Keys(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.captions for part in parts]),
        [error for part in parts for error in part.errors],
    )


@dataclass(frozen=True, slots=True)
class _ReadKeys:
    """Reads rows, in a worker process."""

    source: Source
    min_caption: int

    def __call__(self, indexes: range) -> _Keys:
        images, captions = (np.zeros(len(indexes), np.uint64) for _ in range(2))
        errors = []
        for at, index in enumerate(indexes):
            try:
                row = self.source.row(index)
            except DataError as error:
                errors.append(str(error))
                continue
            if not row.text.strip():
                errors.append(_("{where}: its text is empty", where=self.source.where(index)))
                continue
            errors.append("")
            images[at] = id_digest(self.source, index, row.image_id)
            caption = plain(row.text)
            if 0 < self.min_caption <= len(caption):
                captions[at] = digest(caption)
        return _Keys(images, captions, errors)


@dataclass(frozen=True, slots=True)
class _SameTexts:
    """Images that share a caption, later and earlier numbers (2, K); how many captions."""

    links: npt.NDArray[np.int64]
    captions: int


def _equal_captions(images: RowGroups, captions: npt.NDArray[np.uint64]) -> _SameTexts:
    image_of_row = np.repeat(np.arange(len(images)), np.diff(images.starts))
    texts = captions[images.rows]
    compared = np.flatnonzero(texts)
    image_of_row, texts = image_of_row[compared], texts[compared]
    first = image_of_row[first_equal(texts)]
    other = image_of_row != first
    return _SameTexts(np.stack([image_of_row[other], first[other]]), len(np.unique(texts[other])))

"""Check a source before training: read every row, decode every image, list the problems."""

from __future__ import annotations

import errno
from itertools import islice
from tempfile import TemporaryFile, gettempdir

import numpy as np
import numpy.typing as npt

from cn_clip.data.curate.check_images import (
    ImageBatch,
    ReadImages,
    add_image_problems,
    add_near_duplicates,
)
from cn_clip.data.curate.check_kept import KeptShards
from cn_clip.data.curate.check_result import PROBLEM_KINDS, CheckResult
from cn_clip.data.curate.check_rows import (
    EMPTY_TOKENS,
    ReadRows,
    RowBatch,
    add_repeated_rows,
    add_row_problems,
)
from cn_clip.data.curate.grouping import group_rows
from cn_clip.data.curate.perceptual_hash import DUPLICATE_THRESHOLD
from cn_clip.data.process_map import Progress, Workers, no_progress, parallel_map
from cn_clip.data.sources.base import Source
from cn_clip.errors import CNClipError, UsageError
from cn_clip.html.page import thumbnail
from cn_clip.tokenizer import CONTEXT_LENGTH
from cn_clip.translation import _

_SAMPLES = 24  # pairs shown in the report
_NO_INDEXES = np.empty(0, dtype=np.int64)


def check(
    source: Source,
    *,
    context_length: int = CONTEXT_LENGTH,
    threshold: int = DUPLICATE_THRESHOLD,
    workers: Workers = 0,
    on_progress: Progress = no_progress,
) -> CheckResult:
    """Read every row and decode every image of a source.

    After an interruption, shards of a tar source that were finished are not read again.

    Args:
        source: from ``open_source``.
        context_length: longer captions are listed.
        threshold: maximum differing bits of the perceptual hashes of near-duplicates; 0 turns
            the search off.
        workers: worker processes, or workers of a cluster; 0 runs in this process.
        on_progress: called with (done, total), over rows first and images second.

    Raises:
        UsageError: the source is empty, or the threshold is out of its range.
        DataError: a worker died.
        CNClipError: no disk space for a temporary file of 288 bytes per image.
    """
    if not 0 <= threshold <= 128:
        raise UsageError(
            _("the threshold is {threshold} bits of 256; give 0 to 128", threshold=threshold)
        )
    if not len(source):
        raise UsageError(_("{name} holds no pair", name=source.name))
    result = CheckResult(source.name, pairs=len(source), context_length=context_length)
    for sentence in source.unmatched():
        result.add("unmatched", None, sentence)
    digests = np.zeros((3, len(source)), dtype=np.uint64)
    not_empty = np.zeros(len(source), dtype=bool)
    readable = np.zeros(len(source), dtype=bool)
    kept = KeptShards(source, hashed=threshold > 0)
    done = 0
    with parallel_map(ReadRows(source), workers) as run:
        for batch in kept.batches(run, RowBatch, np.arange(len(source))):
            add_row_problems(source, batch, result)
            rows_done = slice(done, done + len(batch.tokens))
            digests[:, rows_done] = batch.digests
            not_empty[rows_done] = batch.tokens > EMPTY_TOKENS
            readable[rows_done] = batch.tokens > 0
            done += len(batch.tokens)
            on_progress(done, 2 * len(source))
    add_repeated_rows(source, np.flatnonzero(not_empty), digests, result)
    rows = np.flatnonzero(readable)
    firsts = group_rows(rows, digests[0][rows]).firsts
    del digests, not_empty, readable, rows
    result.images = len(firsts)
    done = 0
    decoded: list[npt.NDArray[np.int64]] = []
    # On disk: 288 bytes per image are too much memory for millions of images.
    read_images = ReadImages(source, hashed=threshold > 0)
    try:
        with parallel_map(read_images, workers) as run_images, TemporaryFile() as hashes:
            for images in kept.batches(run_images, ImageBatch, firsts):
                add_image_problems(source, images, result)
                decoded.append(images.indexes)
                hashes.write(images.hashes.tobytes())
                done += len(images.indexes) + len(images.errors)
                on_progress(len(source) + round(len(source) * done / len(firsts)), 2 * len(source))
            if threshold:
                indexes = np.concatenate([_NO_INDEXES, *decoded])
                add_near_duplicates(source, indexes, hashes, result, threshold)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CNClipError(
            _(
                "could not store the hashes of {image_count:,} images in {folder}: {error}; set "
                "TMPDIR to a larger disk, or skip near-duplicates with --threshold 0",
                image_count=len(firsts),
                folder=gettempdir(),
                error=error,
            )
        ) from error
    _draw_samples(source, firsts, result)
    kept.discard()
    result.problems.sort(
        key=lambda problem: (list(PROBLEM_KINDS).index(problem.kind), problem.index or 0)
    )
    return result


def _draw_samples(source: Source, firsts: npt.NDArray[np.int64], result: CheckResult) -> None:
    broken = {problem.index for problem in result.problems if problem.kind == "image"}
    drawn = map(int, np.random.default_rng(0).permutation(firsts))
    for index in islice((pair for pair in drawn if pair not in broken), _SAMPLES):
        try:
            result.samples.append((source.row(index).text, thumbnail(source.image(index))))
        except CNClipError:
            continue  # unreadable, but not listed: the list is limited

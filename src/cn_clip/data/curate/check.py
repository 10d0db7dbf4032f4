"""Check a source before training: read every row, decode every image, list the problems."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from tempfile import TemporaryFile, gettempdir
from typing import IO

import numpy as np
import numpy.typing as npt

from cn_clip.data.captions import digest, language_of, plain
from cn_clip.data.curate.grouping import first_equal, group_rows
from cn_clip.data.curate.perceptual_hash import (
    DUPLICATE_THRESHOLD,
    HASH_WORDS,
    Hashes,
    hash_image,
    near_pairs,
)
from cn_clip.data.process_map import Progress, chunked, no_progress, parallel_map
from cn_clip.data.sources.base import Source, located
from cn_clip.data.sources.open import id_digest
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.html.page import thumbnail
from cn_clip.image.decode import read_image
from cn_clip.text import REPLACEMENT
from cn_clip.tokenizer import CONTEXT_LENGTH, default_tokenizer

# kind -> (whether it makes a source unfit for training, description)
PROBLEM_KINDS = {
    "row": (True, "unreadable rows"),
    "image": (True, "images missing or damaged"),
    "empty": (True, "empty captions"),
    "text id": (True, "text ids used for two texts"),
    "unmatched": (False, "images, texts or files without a pair"),
    "character": (False, "captions with a broken character (U+FFFD)"),
    "long": (False, "captions longer than the context length"),
    "pair": (False, "repeated pairs"),
    "same caption": (False, "captions used for several images"),
    "same image": (False, "near-duplicate images under another id"),
    "small": (False, "images smaller than 64 pixels"),
}
_CHUNK = 128
_BLOCK = 1 << 14  # hashes in memory at once
_SMALL = 64  # pixels of the shorter side
_SAMPLES = 24  # pairs shown in the report
_MAX_LISTED = 1000  # problems listed of each kind; all are counted
_EMPTY_TOKENS = 2  # tokens of an empty text: [CLS] and [SEP]
_NO_INDEXES = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Problem:
    kind: str
    index: int | None
    """Index of the pair in the source."""
    text: str
    """Location and description."""


@dataclass(slots=True)
class CheckResult:
    """Counts and problems of a checked source.

    Attributes:
        counts: number of problems of each kind.
        problems: up to 1000 of each kind, in row order.
        lengths: caption length in tokens -> number of captions.
        languages: Chinese, English, mixed or other -> number of captions.
        sides: shorter image side in pixels -> number of images.
        samples: (caption, JPEG thumbnail) of pairs drawn at random.
    """

    source: str
    pairs: int = 0
    images: int = 0
    captions: int = 0
    context_length: int = CONTEXT_LENGTH
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    lengths: Counter[int] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)
    samples: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def fit(self) -> bool:
        """Whether the source can be trained on."""
        return not any(self.counts[kind] for kind, (unfit, _) in PROBLEM_KINDS.items() if unfit)

    def add(self, kind: str, index: int | None, text: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= _MAX_LISTED:
            self.problems.append(Problem(kind, index, text))

    def add_all(
        self, kind: str, indexes: npt.NDArray[np.int64], describe: Callable[[int], str]
    ) -> None:
        """Add one problem for each row; ``describe`` is called for the listed rows only."""
        for index in indexes[: max(0, _MAX_LISTED - self.counts[kind])].tolist():
            self.problems.append(Problem(kind, index, describe(index)))
        self.counts[kind] += len(indexes)


def check(
    source: Source,
    *,
    context_length: int = CONTEXT_LENGTH,
    threshold: int = DUPLICATE_THRESHOLD,
    workers: int = 0,
    on_progress: Progress = no_progress,
) -> CheckResult:
    """Read every row and decode every image of a source.

    Args:
        source: from ``open_source``.
        context_length: longer captions are listed.
        threshold: maximum differing bits of the perceptual hashes of near-duplicates; 0 turns
            the search off.
        workers: number of worker processes; 0 runs in this process.
        on_progress: called with (done, total), over rows first and images second.

    Raises:
        UsageError: the source is empty, or the threshold is out of its range.
        DataError: a worker died.
        CNClipError: no disk space for a temporary file of 288 bytes per image.
    """
    if not 0 <= threshold <= 128:
        raise UsageError(f"the threshold is {threshold} bits of 256; give 0 to 128")
    if not len(source):
        raise UsageError(f"{source.name} holds no pair")
    result = CheckResult(source.name, pairs=len(source), context_length=context_length)
    for sentence in source.unmatched():
        result.add("unmatched", None, sentence)
    digests = np.zeros((3, len(source)), dtype=np.uint64)
    not_empty = np.zeros(len(source), dtype=bool)
    readable = np.zeros(len(source), dtype=bool)
    done = 0
    with parallel_map(_ReadRows(source), workers) as run:
        for batch in run(chunked(range(len(source)), _CHUNK)):
            _add_row_problems(source, batch, result)
            rows_done = slice(done, done + len(batch.tokens))
            digests[:, rows_done] = batch.digests
            not_empty[rows_done] = batch.tokens > _EMPTY_TOKENS
            readable[rows_done] = batch.tokens > 0
            done += len(batch.tokens)
            on_progress(done, 2 * len(source))
    _add_repeated_rows(source, np.flatnonzero(not_empty), digests, result)
    rows = np.flatnonzero(readable)
    firsts = group_rows(rows, digests[0][rows]).firsts
    del digests, not_empty, readable, rows
    result.images = len(firsts)
    done = 0
    decoded: list[npt.NDArray[np.int64]] = []
    # On disk: 288 bytes per image are too much memory for millions of images.
    read_images = _ReadImages(source, hashed=threshold > 0)
    try:
        with parallel_map(read_images, workers) as run_images, TemporaryFile() as hashes:
            for images in run_images(chunked(firsts, _CHUNK)):
                _add_image_problems(source, images, result)
                decoded.append(images.indexes)
                hashes.write(images.hashes.tobytes())
                done += len(images.indexes) + len(images.errors)
                on_progress(len(source) + round(len(source) * done / len(firsts)), 2 * len(source))
            if threshold:
                indexes = np.concatenate([_NO_INDEXES, *decoded])
                _add_near_duplicates(source, indexes, hashes, result, threshold)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CNClipError(
            f"could not store the hashes of {len(firsts):,} images in {gettempdir()}: {error}; "
            "set TMPDIR to a larger disk, or skip near-duplicates with --threshold 0"
        ) from error
    _draw_samples(source, firsts, result)
    result.problems.sort(
        key=lambda problem: (list(PROBLEM_KINDS).index(problem.kind), problem.index or 0)
    )
    return result


@dataclass(frozen=True, slots=True)
class _RowBatch:
    """N consecutive rows, read.

    Attributes:
        digests: uint64 (3, N), of the image id, the text id and the text.
        tokens: (N,) tokens of each text; 0 for an unreadable row.
        languages: language -> number of texts.
        broken: indexes of the rows whose text holds U+FFFD.
        errors: one message for each unreadable row.
    """

    start: int
    digests: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.int64]
    languages: Counter[str]
    broken: list[int]
    errors: list[str]


@dataclass(frozen=True, slots=True)
class _ReadRows:
    source: Source

    def __call__(self, indexes: range) -> _RowBatch:
        batch = _RowBatch(
            indexes.start,
            np.zeros((3, len(indexes)), dtype=np.uint64),
            np.zeros(len(indexes), dtype=np.int64),
            Counter(),
            [],
            [],
        )
        readable, texts = [], []
        for at, index in enumerate(indexes):
            try:
                row = self.source.row(index)
            except DataError as error:
                batch.errors.append(str(error))
                continue
            image_id = id_digest(self.source, index, row.image_id)
            text_id = id_digest(self.source, index, row.text_id)
            batch.digests[:, at] = image_id, text_id, digest(plain(row.text))
            batch.languages[language_of(row.text)] += 1
            if REPLACEMENT in row.text:
                batch.broken.append(index)
            readable.append(at)
            texts.append(row.text)
        # Not cut at the context length: the report states true lengths.
        batch.tokens[readable] = [len(ids) for ids in default_tokenizer().encode(texts, 1 << 20)]
        return batch


def _add_row_problems(source: Source, batch: _RowBatch, result: CheckResult) -> None:
    """Add problems of single rows."""
    result.languages += batch.languages
    result.lengths.update(batch.tokens[batch.tokens > 0].tolist())
    for at, error in zip(np.flatnonzero(batch.tokens == 0).tolist(), batch.errors, strict=True):
        result.add("row", batch.start + at, error)

    def cut(index: int) -> str:
        tokens = int(batch.tokens[index - batch.start])
        return f"{source.where(index)}: {tokens} tokens, {tokens - result.context_length} are cut"

    def empty(index: int) -> str:
        return f"{source.where(index)}: its text is empty"

    def broken(index: int) -> str:
        return f"{source.where(index)}: {source.row(index).text[:40]!r} has a broken character"

    if batch.broken:
        result.add_all("character", np.array(batch.broken, dtype=np.int64), broken)
    long = (batch.tokens > result.context_length) & (batch.tokens > _EMPTY_TOKENS)
    result.add_all("empty", batch.start + np.flatnonzero(batch.tokens == _EMPTY_TOKENS), empty)
    result.add_all("long", batch.start + np.flatnonzero(long), cut)


def _add_repeated_rows(
    source: Source,
    rows: npt.NDArray[np.int64],
    digests: npt.NDArray[np.uint64],
    result: CheckResult,
) -> None:
    """Add problems between rows; ``rows`` are those whose text is not empty."""
    texts = digests[2][rows]
    before = first_equal(digests[1][rows])
    other = np.flatnonzero(texts != texts[before])
    first_rows = dict(
        zip(
            rows[other[:_MAX_LISTED]].tolist(),
            rows[before[other[:_MAX_LISTED]]].tolist(),
            strict=True,
        )
    )

    def text_id(index: int) -> str:
        return (
            f"{source.where(index)}: its text id is also that of {source.where(first_rows[index])}"
        )

    def pair(index: int) -> str:
        return f"{source.where(index)}: repeats an earlier pair of the same image and text"

    def caption(index: int) -> str:
        text = source.row(index).text[:40]
        return f"{source.where(index)}: {text!r} is also an earlier caption"

    result.add_all("text id", rows[other], text_id)
    del before
    images = digests[0][rows]
    both = images * np.uint64(0x9E3779B97F4A7C15) + texts  # a digest of the pair
    result.add_all("pair", rows[_repeated(both)], pair)
    del both
    before = first_equal(texts)
    other = np.flatnonzero(images != images[before])
    once = ~_repeated(texts[other])  # each caption is listed once
    result.add_all("same caption", rows[other[once]], caption)
    result.captions = int(np.count_nonzero(before == np.arange(len(rows))))


def _repeated(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Return for each of N keys whether an earlier one equals it."""
    repeated: npt.NDArray[np.bool_] = first_equal(keys) != np.arange(len(keys))
    return repeated


@dataclass(frozen=True, slots=True)
class _ImageBatch:
    """Pair indexes (N,), shorter image sides (N,), and hashes (N, 36), or (0, 36) without hashing;
    (index, reason) of each unreadable image."""

    indexes: npt.NDArray[np.int64]
    sides: npt.NDArray[np.int64]
    hashes: Hashes
    errors: list[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class _ReadImages:
    source: Source
    hashed: bool

    def __call__(self, indexes: npt.NDArray[np.int64]) -> _ImageBatch:
        decoded, sides, hashes, errors = [], [], [], []
        for index in indexes.tolist():
            try:
                image = read_image(self.source.image(index), background="white")
            except CNClipError as error:
                errors.append((index, located(self.source, index, error)))
                continue
            decoded.append(index)
            sides.append(min(image.size))
            if self.hashed:
                hashes.append(hash_image(image))
            del image  # before the next is decoded: both may be large
        stacked = np.stack(hashes) if hashes else np.empty((0, HASH_WORDS), dtype=np.uint64)
        return _ImageBatch(
            np.array(decoded, dtype=np.int64), np.array(sides, dtype=np.int64), stacked, errors
        )


def _add_image_problems(source: Source, batch: _ImageBatch, result: CheckResult) -> None:
    """Add problems of single images."""
    for index, error in batch.errors:
        result.add("image", index, error)
    result.sides.update(batch.sides.tolist())
    sides = dict(zip(batch.indexes.tolist(), batch.sides.tolist(), strict=True))

    def small(index: int) -> str:
        return f"{source.where(index)}: its shorter side is {sides[index]} pixels"

    result.add_all("small", batch.indexes[batch.sides < _SMALL], small)


def _add_near_duplicates(
    source: Source,
    indexes: npt.NDArray[np.int64],
    hash_file: IO[bytes],
    result: CheckResult,
    threshold: int,
) -> None:
    """Add near-duplicate images; ``hash_file`` holds the hashes of the pairs ``indexes``."""
    if len(indexes) < 2:
        return
    hashes = _memory_map(hash_file, len(indexes))
    # First by equality: an image repeated a thousand times would make a million near pairs.
    before = first_equal(
        np.concatenate([_short_digests(hashes[at]) for at in _blocks(len(indexes))])
    )
    positions = np.arange(len(indexes))
    distinct = np.flatnonzero(before == positions)
    with TemporaryFile() as distinct_file:
        for at in _blocks(len(distinct)):
            distinct_file.write(hashes[distinct[at]].tobytes())
        distinct_hashes = _memory_map(distinct_file, len(distinct))
        later, earlier = (distinct[rows] for rows in near_pairs(distinct_hashes, threshold))
    np.minimum.at(before, later, earlier)
    duplicates = np.flatnonzero(before != positions)

    def same(index: int) -> str:
        first = indexes[before[np.searchsorted(indexes, index)]]
        return f"{source.where(index)}: looks like {source.where(int(first))}"

    result.add_all("same image", indexes[duplicates], same)


def _memory_map(hash_file: IO[bytes], count: int) -> Hashes:
    """Map the hashes in a file into memory."""
    hash_file.flush()
    return np.memmap(hash_file, np.uint64, "r", shape=(count, HASH_WORDS))


def _blocks(count: int) -> list[slice]:
    return [slice(at, min(at + _BLOCK, count)) for at in range(0, count, _BLOCK)]


def _short_digests(hashes: Hashes) -> npt.NDArray[np.uint64]:
    """Return a 64-bit digest of each of N hashes (N, 36)."""
    short = b"".join(blake2b(row.tobytes(), digest_size=8).digest() for row in hashes)
    return np.frombuffer(short, dtype=np.uint64)


def _draw_samples(source: Source, firsts: npt.NDArray[np.int64], result: CheckResult) -> None:
    broken = {problem.index for problem in result.problems if problem.kind == "image"}
    drawn = map(int, np.random.default_rng(0).permutation(firsts))
    for index in islice((pair for pair in drawn if pair not in broken), _SAMPLES):
        try:
            result.samples.append((source.row(index).text, thumbnail(source.image(index))))
        except CNClipError:
            continue  # unreadable, but not listed: the list is limited

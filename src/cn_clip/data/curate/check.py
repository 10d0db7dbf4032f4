"""What is wrong with a source before anything is trained on it: every row and picture is read."""

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
from cn_clip.data.curate.grouping import first_equal, grouped
from cn_clip.data.curate.perceptual_hash import SAME, WORDS, Hashes, hash_image, near_pairs
from cn_clip.data.process_map import chunked, mapped
from cn_clip.data.sources.base import Source, located
from cn_clip.data.sources.open import id_digest
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.html.page import thumbnail
from cn_clip.image.decode import read_image
from cn_clip.text import REPLACEMENT
from cn_clip.tokenizer import CONTEXT_LENGTH, default_tokenizer

# kind -> whether it makes a source unfit, and what it means
KINDS = {
    "row": (True, "rows that cannot be read"),
    "picture": (True, "pictures missing or damaged"),
    "empty": (True, "captions without a word"),
    "text id": (True, "text ids used for two texts"),
    "unmatched": (False, "pictures, texts or files that make no pair"),
    "character": (False, "captions with a broken character (U+FFFD)"),
    "long": (False, "captions longer than the context length"),
    "pair": (False, "pairs that come twice"),
    "same caption": (False, "captions used for several pictures"),
    "same picture": (False, "near-duplicate pictures under another id"),
    "small": (False, "pictures smaller than 64 pixels"),
}
_CHUNK = 128
_BLOCK = 1 << 14  # hashes that are in memory at once
_SMALL = 64  # pixels of the shorter side
_SHEET = 24  # pictures on the sheet
_PER_KIND = 1000  # problems of a kind that are listed; all are counted
_NO_WORD = 2  # tokens of an empty text: [CLS] and [SEP]
_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Problem:
    kind: str
    index: int | None
    """Number of the pair in the source, from 0."""
    text: str
    """Where it is, and what is wrong."""


@dataclass(slots=True)
class Checked:
    """What was found.

    Attributes:
        counts: problems of each kind.
        problems: up to a thousand of each kind, in the order of the rows.
        lengths: how many captions have so many tokens, by number.
        languages: how many captions are Chinese, English, mixed, or of other signs.
        sides: how many pictures have a shorter side of so many pixels.
        sheet: (caption, JPEG thumbnail) of some pairs drawn at random.
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
    sheet: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def fit(self) -> bool:
        """Whether nothing was found that makes the source unfit."""
        return not any(self.counts[kind] for kind, (unfit, _) in KINDS.items() if unfit)

    def add(self, kind: str, index: int | None, text: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= _PER_KIND:
            self.problems.append(Problem(kind, index, text))

    def add_all(self, kind: str, indexes: npt.NDArray[np.int64], say: Callable[[int], str]) -> None:
        """Add a problem of many rows; ``say`` is asked about those that are listed."""
        for index in indexes[: max(0, _PER_KIND - self.counts[kind])].tolist():
            self.problems.append(Problem(kind, index, say(index)))
        self.counts[kind] += len(indexes)


def check(
    source: Source,
    *,
    context_length: int = CONTEXT_LENGTH,
    threshold: int = SAME,
    workers: int = 0,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Read every row and decode every picture of a source.

    Args:
        source: from ``open_source``.
        context_length: captions with more tokens than that are named.
        threshold: bits of a perceptual hash in which near-duplicates may differ, at most 128; 0
            turns the search off.
        workers: processes beside this one; 0 does it here.
        tick: called with what is done, rows and then pictures, and how much there is.

    Raises:
        UsageError: the source is empty, or the threshold is out of its range.
        DataError: a worker died.
        CNClipError: there is no space for a temporary file of 288 bytes a picture.
    """
    if not 0 <= threshold <= 128:
        raise UsageError(f"the threshold is {threshold} bits of 256; give 0 to 128")
    if not len(source):
        raise UsageError(f"{source.name} holds no pair")
    found = Checked(source.name, pairs=len(source), context_length=context_length)
    for sentence in source.unmatched():
        found.add("unmatched", None, sentence)
    digests = np.zeros((3, len(source)), dtype=np.uint64)
    worded = np.zeros(len(source), dtype=bool)
    readable = np.zeros(len(source), dtype=bool)
    done = 0
    with mapped(_Rows(source), workers) as run:
        for told in run(chunked(range(len(source)), _CHUNK)):
            _judge_rows(source, told, found)
            held = slice(done, done + len(told.tokens))
            digests[:, held] = told.digests
            worded[held] = told.tokens > _NO_WORD
            readable[held] = told.tokens > 0
            done += len(told.tokens)
            tick(done, 2 * len(source))
    _compare_rows(source, np.flatnonzero(worded), digests, found)
    rows = np.flatnonzero(readable)
    firsts = grouped(rows, digests[0][rows]).firsts
    del digests, worded, readable, rows
    found.images = len(firsts)
    done = 0
    whole: list[npt.NDArray[np.int64]] = []
    # Some 300 bytes a picture: too much for memory where there are millions.
    hashing = _Pictures(source, hashed=threshold > 0)
    try:
        with mapped(hashing, workers) as run_pictures, TemporaryFile() as hashes:
            for seen in run_pictures(chunked(firsts, _CHUNK)):
                _judge_pictures(source, seen, found)
                whole.append(seen.indexes)
                hashes.write(seen.hashes.tobytes())
                done += len(seen.indexes) + len(seen.errors)
                tick(len(source) + round(len(source) * done / len(firsts)), 2 * len(source))
            if threshold:
                indexes = np.concatenate([_NONE, *whole])
                _compare_pictures(source, indexes, hashes, found, threshold)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CNClipError(
            f"could not keep the hashes of {len(firsts):,} pictures in {gettempdir()}: {error}; "
            "name a larger place with TMPDIR, or do without near-duplicates: --threshold 0"
        ) from error
    _draw_sheet(source, firsts, found)
    found.problems.sort(key=lambda problem: (list(KINDS).index(problem.kind), problem.index or 0))
    return found


@dataclass(frozen=True, slots=True)
class _Told:
    """What is kept of N rows.

    Attributes:
        digests: uint64 (3, N), of the picture, the text id and the text.
        tokens: how many the texts have; 0 where the row cannot be read.
        languages: how many texts there are in each.
        broken: the rows whose text has a character that was half of one, or bytes of none.
        errors: why the rows with 0 tokens cannot be read.
    """

    start: int
    digests: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.int64]
    languages: Counter[str]
    broken: list[int]
    errors: list[str]


@dataclass(frozen=True, slots=True)
class _Rows:
    source: Source

    def __call__(self, indexes: range) -> _Told:
        told = _Told(
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
                told.errors.append(str(error))
                continue
            picture = id_digest(self.source, index, row.image_id)
            text_id = id_digest(self.source, index, row.text_id)
            told.digests[:, at] = picture, text_id, digest(plain(row.text))
            told.languages[language_of(row.text)] += 1
            if REPLACEMENT in row.text:
                told.broken.append(index)
            readable.append(at)
            texts.append(row.text)
        # A large length, because what is over the limit is to be told with its true length.
        told.tokens[readable] = [len(ids) for ids in default_tokenizer().encode(texts, 1 << 20)]
        return told


def _judge_rows(source: Source, told: _Told, found: Checked) -> None:
    """Add what is wrong with rows by themselves."""
    found.languages += told.languages
    found.lengths.update(told.tokens[told.tokens > 0].tolist())
    for at, error in zip(np.flatnonzero(told.tokens == 0).tolist(), told.errors, strict=True):
        found.add("row", told.start + at, error)

    def cut(index: int) -> str:
        tokens = int(told.tokens[index - told.start])
        return f"{source.where(index)}: {tokens} tokens, {tokens - found.context_length} are cut"

    def empty(index: int) -> str:
        return f"{source.where(index)}: its text holds no word"

    def broken(index: int) -> str:
        return f"{source.where(index)}: {source.row(index).text[:40]!r} has a broken character"

    if told.broken:
        found.add_all("character", np.array(told.broken, dtype=np.int64), broken)
    long = (told.tokens > found.context_length) & (told.tokens > _NO_WORD)
    found.add_all("empty", told.start + np.flatnonzero(told.tokens == _NO_WORD), empty)
    found.add_all("long", told.start + np.flatnonzero(long), cut)


def _compare_rows(
    source: Source,
    rows: npt.NDArray[np.int64],
    digests: npt.NDArray[np.uint64],
    found: Checked,
) -> None:
    """Add what is wrong with rows beside others; ``rows`` are those with a word."""
    texts = digests[2][rows]
    before = first_equal(digests[1][rows])
    other = np.flatnonzero(texts != texts[before])
    named = dict(
        zip(rows[other[:_PER_KIND]].tolist(), rows[before[other[:_PER_KIND]]].tolist(), strict=True)
    )

    def text_id(index: int) -> str:
        return f"{source.where(index)}: its text id is that of {source.where(named[index])}"

    def pair(index: int) -> str:
        return f"{source.where(index)}: this picture had this text before"

    def caption(index: int) -> str:
        text = source.row(index).text[:40]
        return f"{source.where(index)}: {text!r} is used before too"

    found.add_all("text id", rows[other], text_id)
    del before
    pictures = digests[0][rows]
    both = pictures * np.uint64(0x9E3779B97F4A7C15) + texts  # of digests, so it is one too
    found.add_all("pair", rows[_repeated(both)], pair)
    del both
    before = first_equal(texts)
    other = np.flatnonzero(pictures != pictures[before])
    once = ~_repeated(texts[other])  # each caption is told once
    found.add_all("same caption", rows[other[once]], caption)
    found.captions = int(np.count_nonzero(before == np.arange(len(rows))))


def _repeated(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Tell of each of N keys whether it was there before."""
    repeated: npt.NDArray[np.bool_] = first_equal(keys) != np.arange(len(keys))
    return repeated


@dataclass(frozen=True, slots=True)
class _Seen:
    """Numbers of N pairs, the shorter sides of their pictures and their hashes (N, 36), if they are
    to be compared; and for those that cannot be read the reasons."""

    indexes: npt.NDArray[np.int64]
    sides: npt.NDArray[np.int64]
    hashes: Hashes
    errors: list[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class _Pictures:
    source: Source
    hashed: bool

    def __call__(self, indexes: npt.NDArray[np.int64]) -> _Seen:
        whole, sides, hashes, errors = [], [], [], []
        for index in indexes.tolist():
            try:
                image = read_image(self.source.image(index), background="white")
            except CNClipError as error:
                errors.append((index, located(self.source, index, error)))
                continue
            whole.append(index)
            sides.append(min(image.size))
            if self.hashed:
                hashes.append(hash_image(image))
            del image  # not beside the next one: both may be large
        stacked = np.stack(hashes) if hashes else np.empty((0, WORDS), dtype=np.uint64)
        return _Seen(
            np.array(whole, dtype=np.int64), np.array(sides, dtype=np.int64), stacked, errors
        )


def _judge_pictures(source: Source, seen: _Seen, found: Checked) -> None:
    """Add what is wrong with pictures by themselves."""
    for index, error in seen.errors:
        found.add("picture", index, error)
    found.sides.update(seen.sides.tolist())
    sides = dict(zip(seen.indexes.tolist(), seen.sides.tolist(), strict=True))

    def small(index: int) -> str:
        return f"{source.where(index)}: its shorter side has {sides[index]} pixels"

    found.add_all("small", seen.indexes[seen.sides < _SMALL], small)


def _compare_pictures(
    source: Source,
    indexes: npt.NDArray[np.int64],
    written: IO[bytes],
    found: Checked,
    threshold: int,
) -> None:
    """Add near-duplicates; ``written`` holds the hashes of the pairs ``indexes``."""
    if len(indexes) < 2:
        return
    hashes = _mapped(written, len(indexes))
    # A picture that is there a thousand times would make a million pairs with itself.
    before = first_equal(np.concatenate([_mixed(hashes[at]) for at in _blocks(len(indexes))]))
    places = np.arange(len(indexes))
    different = np.flatnonzero(before == places)
    with TemporaryFile() as kept:
        for at in _blocks(len(different)):
            kept.write(hashes[different[at]].tobytes())
        later, earlier = (
            different[each] for each in near_pairs(_mapped(kept, len(different)), threshold)
        )
    np.minimum.at(before, later, earlier)
    again = np.flatnonzero(before != places)

    def same(index: int) -> str:
        first = indexes[before[np.searchsorted(indexes, index)]]
        return f"{source.where(index)}: looks like {source.where(int(first))}"

    found.add_all("same picture", indexes[again], same)


def _mapped(written: IO[bytes], count: int) -> Hashes:
    """Return hashes that were written to a file, without reading them."""
    written.flush()
    return np.memmap(written, np.uint64, "r", shape=(count, WORDS))


def _blocks(count: int) -> list[slice]:
    return [slice(at, min(at + _BLOCK, count)) for at in range(0, count, _BLOCK)]


def _mixed(hashes: Hashes) -> npt.NDArray[np.uint64]:
    """Return 64 bits for each of N hashes (N, 36), the same for the same ones."""
    short = b"".join(blake2b(each.tobytes(), digest_size=8).digest() for each in hashes)
    return np.frombuffer(short, dtype=np.uint64)


def _draw_sheet(source: Source, firsts: npt.NDArray[np.int64], found: Checked) -> None:
    broken = {problem.index for problem in found.problems if problem.kind == "picture"}
    drawn = map(int, np.random.default_rng(0).permutation(firsts))
    for index in islice((each for each in drawn if each not in broken), _SHEET):
        try:
            found.sheet.append((source.row(index).text, thumbnail(source.image(index))))
        except CNClipError:
            continue  # among the broken ones beyond those that are listed

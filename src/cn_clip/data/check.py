"""What is wrong with a source before anything is trained on it: every row and picture is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cn_clip.data.captions import digest, language_of, plain
from cn_clip.data.page import thumbnail
from cn_clip.data.pair import Source, located
from cn_clip.data.similar import SAME, hash_image, near_pairs
from cn_clip.data.workers import chunked, mapped
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.image import read_image
from cn_clip.tokenizer import CONTEXT_LENGTH, default_tokenizer

# kind -> whether it makes a source unfit, and what it means
KINDS = {
    "row": (True, "rows that cannot be read"),
    "picture": (True, "pictures missing or damaged"),
    "empty": (True, "captions without a word"),
    "text id": (True, "text ids used for two texts"),
    "unmatched": (False, "pictures or texts without the other"),
    "long": (False, "captions longer than the context length"),
    "pair": (False, "pairs that come twice"),
    "same caption": (False, "captions used for several pictures"),
    "same picture": (False, "near-duplicate pictures under another id"),
    "small": (False, "pictures smaller than 64 pixels"),
}
_CHUNK = 128
_SMALL = 64  # pixels of the shorter side
_SHEET = 24  # pictures on the sheet
_PER_KIND = 1000  # problems of a kind that are listed; all are counted


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
        threshold: bits of a perceptual hash in which near-duplicates may differ; 0 turns the
            search off.
        workers: processes beside this one; 0 does it here.
        tick: called with what is done, rows and then pictures, and how much there is.

    Raises:
        UsageError: the source is empty.
        DataError: a worker died.
    """
    if not len(source):
        raise UsageError(f"{source.name} holds no pair")
    found = Checked(source.name, pairs=len(source), context_length=context_length)
    for sentence in source.unmatched():
        found.add("unmatched", None, sentence)
    rows: list[_Row] = []
    with mapped(_Rows(source, context_length), workers) as run:
        for told in run(chunked(range(len(source)), _CHUNK)):
            rows += told
            tick(len(rows), 2 * len(source))
    _judge_rows(source, rows, found)
    firsts = _first_of_each_picture(rows)
    found.images = len(firsts)
    pictures: list[_Picture] = []
    with mapped(_Pictures(source), workers) as run_pictures:
        for seen in run_pictures(chunked(firsts, _CHUNK)):
            pictures += seen
            share = len(pictures) / max(1, len(firsts))
            tick(len(source) + round(len(source) * share), 2 * len(source))
    _judge_pictures(source, pictures, found, threshold)
    _draw_sheet(source, firsts, found)
    found.problems.sort(key=lambda problem: (list(KINDS).index(problem.kind), problem.index or 0))
    return found


@dataclass(slots=True)
class _Row:
    """What is kept of a row: 64-bit digests, so that millions fit."""

    index: int
    error: str | None = None
    image_id: int = 0
    text_id: int = 0
    text: int = 0
    tokens: int = 0
    language: str = ""


@dataclass(frozen=True, slots=True)
class _Rows:
    source: Source
    context_length: int

    def __call__(self, indexes: Sequence[int]) -> list[_Row]:
        rows, texts = [], []
        for index in indexes:
            try:
                row = self.source.row(index)
            except DataError as error:
                rows.append(_Row(index, error=str(error)))
                continue
            image_id, text_id = digest(row.image_id), digest(row.text_id)
            text, language = digest(plain(row.text)), language_of(row.text)
            rows.append(_Row(index, None, image_id, text_id, text, language=language))
            texts.append(row.text)
        # A large length, because what is over the limit is to be told with its true length.
        lengths = iter(map(len, default_tokenizer().encode(texts, 1 << 20)))
        for each in rows:
            each.tokens = 0 if each.error else next(lengths)
        return rows


def _judge_rows(source: Source, rows: Sequence[_Row], found: Checked) -> None:
    texts_of: dict[int, tuple[int, int]] = {}
    images_of: dict[int, int] = {}
    told: set[int] = set()
    pairs: set[tuple[int, int]] = set()

    def add(kind: str, row: _Row, said: str) -> None:
        found.add(kind, row.index, f"{source.where(row.index)}: {said}")

    for row in rows:
        if row.error:
            found.add("row", row.index, row.error)
            continue
        found.lengths[row.tokens] += 1
        found.languages[row.language] += 1
        if row.tokens == 2:  # [CLS] and [SEP]
            add("empty", row, "its text holds no word")
            continue
        if row.tokens > found.context_length:
            cut = row.tokens - found.context_length
            add("long", row, f"{row.tokens} tokens, {cut} are cut")
        first, text = texts_of.setdefault(row.text_id, (row.index, row.text))
        if text != row.text:
            add("text id", row, f"its text id is that of {source.where(first)}")
        if (row.image_id, row.text) in pairs:
            add("pair", row, "this picture had this text before")
        pairs.add((row.image_id, row.text))
        if images_of.setdefault(row.text, row.image_id) != row.image_id and row.text not in told:
            told.add(row.text)
            add("same caption", row, f"{source.row(row.index).text[:40]!r} is used before too")
    found.captions = len(images_of)


def _first_of_each_picture(rows: Sequence[_Row]) -> list[int]:
    firsts: dict[int, int] = {}
    for row in rows:
        if not row.error:
            firsts.setdefault(row.image_id, row.index)
    return list(firsts.values())


@dataclass(slots=True)
class _Picture:
    index: int
    error: str | None = None
    side: int = 0
    hash: npt.NDArray[np.uint64] | None = None


@dataclass(frozen=True, slots=True)
class _Pictures:
    source: Source

    def __call__(self, indexes: Sequence[int]) -> list[_Picture]:
        return [self._examine(index) for index in indexes]

    def _examine(self, index: int) -> _Picture:
        try:
            image = read_image(self.source.image(index), background="white")
        except CNClipError as error:
            return _Picture(index, error=located(self.source, index, error))
        return _Picture(index, side=min(image.size), hash=hash_image(image))


def _judge_pictures(
    source: Source, pictures: Sequence[_Picture], found: Checked, threshold: int
) -> None:
    for picture in pictures:
        if picture.error:
            found.add("picture", picture.index, picture.error)
            continue
        found.sides[picture.side] += 1
        if picture.side < _SMALL:
            where = source.where(picture.index)
            found.add(
                "small", picture.index, f"{where}: its shorter side has {picture.side} pixels"
            )
    whole = [(p.index, p.hash) for p in pictures if p.hash is not None]
    if threshold == 0 or len(whole) < 2:
        return
    hashes = np.stack([hashed for _, hashed in whole])
    later, earlier = near_pairs(hashes, threshold)
    before: dict[int, int] = {}
    for at, first in sorted(zip(later.tolist(), earlier.tolist(), strict=True)):
        before.setdefault(at, first)
    for at, first in before.items():
        index, like = whole[at][0], whole[first][0]
        found.add("same picture", index, f"{source.where(index)}: looks like {source.where(like)}")


def _draw_sheet(source: Source, firsts: Sequence[int], found: Checked) -> None:
    broken = {problem.index for problem in found.problems if problem.kind == "picture"}
    drawn = np.random.default_rng(0).permutation(np.array(firsts, dtype=np.int64)).tolist()
    for index in [each for each in drawn if each not in broken][:_SHEET]:
        try:
            found.sheet.append((source.row(index).text, thumbnail(source.image(index))))
        except CNClipError:
            continue  # among the broken ones beyond those that are listed

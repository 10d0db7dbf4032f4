"""Problems of rows: unreadable, empty, long, repeated."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cn_clip.data.captions import digest, language_of, plain
from cn_clip.data.curate.check_result import MAX_LISTED, CheckResult
from cn_clip.data.curate.grouping import first_equal
from cn_clip.data.sources.base import Source
from cn_clip.data.sources.open import id_digest
from cn_clip.errors import DataError
from cn_clip.text import REPLACEMENT
from cn_clip.tokenizer import default_tokenizer
from cn_clip.translation import _

EMPTY_TOKENS = 2  # tokens of an empty text: [CLS] and [SEP]


@dataclass(frozen=True, slots=True)
class RowBatch:
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

    @classmethod
    def joined(cls, batches: Sequence[Self]) -> Self:
        """Return the rows of consecutive batches."""
        return cls(
            batches[0].start,
            np.concatenate([batch.digests for batch in batches], axis=1),
            np.concatenate([batch.tokens for batch in batches]),
            sum((batch.languages for batch in batches), Counter()),
            [index for batch in batches for index in batch.broken],
            [error for batch in batches for error in batch.errors],
        )

    def to_arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """Return all of it in arrays."""
        rest = [self.start, self.languages, self.broken, self.errors]
        return {"digests": self.digests, "tokens": self.tokens, "rest": np.array(json.dumps(rest))}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Return what ``to_arrays`` gave."""
        start, languages, broken, errors = json.loads(str(arrays["rest"]))
        return cls(start, arrays["digests"], arrays["tokens"], Counter(languages), broken, errors)

    @classmethod
    def names(cls) -> Sequence[str]:
        """Return the names of its arrays."""
        return ("digests", "tokens", "rest")


@dataclass(frozen=True, slots=True)
class ReadRows:
    """Reads rows, in a worker process."""

    source: Source

    def __call__(self, indexes: npt.NDArray[np.int64]) -> RowBatch:
        batch = RowBatch(
            int(indexes[0]),
            np.zeros((3, len(indexes)), dtype=np.uint64),
            np.zeros(len(indexes), dtype=np.int64),
            Counter(),
            [],
            [],
        )
        readable, texts = [], []
        for at, index in enumerate(indexes.tolist()):
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


def add_row_problems(source: Source, batch: RowBatch, result: CheckResult) -> None:
    """Add problems of single rows."""
    result.languages += batch.languages
    result.lengths.update(batch.tokens[batch.tokens > 0].tolist())
    for at, error in zip(np.flatnonzero(batch.tokens == 0).tolist(), batch.errors, strict=True):
        result.add("row", batch.start + at, error)

    def cut(index: int) -> str:
        tokens = int(batch.tokens[index - batch.start])
        return _(
            "{where}: {tokens} tokens, {excess} are cut",
            where=source.where(index),
            tokens=tokens,
            excess=tokens - result.context_length,
        )

    def empty(index: int) -> str:
        return _("{where}: its text is empty", where=source.where(index))

    def broken(index: int) -> str:
        return _(
            "{where}: {text!r} has a broken character",
            where=source.where(index),
            text=source.row(index).text[:40],
        )

    if batch.broken:
        result.add_all("character", np.array(batch.broken, dtype=np.int64), broken)
    long = (batch.tokens > result.context_length) & (batch.tokens > EMPTY_TOKENS)
    result.add_all("empty", batch.start + np.flatnonzero(batch.tokens == EMPTY_TOKENS), empty)
    result.add_all("long", batch.start + np.flatnonzero(long), cut)


def add_repeated_rows(
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
            rows[other[:MAX_LISTED]].tolist(),
            rows[before[other[:MAX_LISTED]]].tolist(),
            strict=True,
        )
    )

    def text_id(index: int) -> str:
        return _(
            "{where}: its text id is also that of {earlier}",
            where=source.where(index),
            earlier=source.where(first_rows[index]),
        )

    def pair(index: int) -> str:
        return _(
            "{where}: repeats an earlier pair of the same image and text", where=source.where(index)
        )

    def caption(index: int) -> str:
        text = source.row(index).text[:40]
        return _(
            "{where}: {text!r} is also an earlier caption", where=source.where(index), text=text
        )

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

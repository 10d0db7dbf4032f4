"""Training pairs that a test set holds too: the same picture, little changed, or the same text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from cn_clip.data.captions import digest, plain
from cn_clip.data.curate.grouping import Groups, grouped
from cn_clip.data.curate.perceptual_hash import (
    THRESHOLD,
    Hashes,
    HashIndex,
    build,
    hash_image,
    search,
    trimmed,
    variants,
)
from cn_clip.data.process_map import chunked, mapped
from cn_clip.data.sources.base import Source, located
from cn_clip.data.sources.open import id_digest
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.files import MAX_FILE, read_lines
from cn_clip.html.page import data_uri, page, thumbnail
from cn_clip.image.decode import read_image
from cn_clip.publish import begins, claim, file_by, published, unwritable_named, write_text
from cn_clip.text import read_json

_CHUNK = 128
_FORMAT = "cn-clip data decontaminate 1"  # stands first in the list of what is removed
_SHOWN = 200  # removed pairs on the page
_DECODED = 256  # pixels that a JPEG is decoded to at least: a hash sees 64


@dataclass(frozen=True, slots=True)
class Removed:
    """A training pair, and what it was found in."""

    index: int
    reason: Literal["picture", "caption"]
    against: int
    """Number of the pair in the test set."""
    distance: int = 0
    """Bits of 256 in which the pictures' hashes differ."""


@dataclass(slots=True)
class Decontaminated:
    """What was found; ``unreadable`` has a sentence for each picture that could not be compared."""

    train: str
    against: str
    pairs: int
    test_images: int = 0
    threshold: int = THRESHOLD
    min_caption: int = 0
    removed: list[Removed] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def by_picture(self) -> int:
        """How many pairs their picture gave away."""
        return sum(each.reason == "picture" for each in self.removed)

    @property
    def by_caption(self) -> int:
        """How many pairs only their caption gave away."""
        return len(self.removed) - self.by_picture


def decontaminate(
    train: Source,
    against: Source,
    *,
    threshold: int = THRESHOLD,
    min_caption: int = 5,
    workers: int = 0,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Decontaminated:
    """Find the pairs of ``train`` that must not be trained on if ``against`` is to test anything.

    Every text of a picture goes with it. Test pictures are hashed with their mirror images and
    without 5 % at their sides and corners, and all pictures with and without margins of one
    colour, so that such copies are found too.

    Args:
        train: what is to be trained on.
        against: the test set.
        threshold: the most bits of 256 in which the hashes of one picture differ; 0 compares no
            pictures.
        min_caption: captions with fewer characters, punctuation aside, are not compared: anybody
            calls a picture of a cat 一只猫. 0 compares no captions.
        workers: processes beside this one; 0 does it here.
        tick: called with the training pictures done, and all.

    Raises:
        UsageError: a limit is out of its range.
        DataError: a test picture cannot be read, so that nothing could be proven; or a worker died.
    """
    if not 0 <= threshold <= 128:
        raise UsageError(f"the threshold is {threshold} bits of 256; give 0 to 128")
    found = Decontaminated(train.name, against.name, len(train), 0, threshold, min_caption)
    tests, captions = _test_rows(against, min_caption)
    found.test_images = len(tests)
    known: list[_Hashes] = []
    with mapped(_Hashed(against, all_variants=True), workers) as run:
        for told in run(chunked(tests, _CHUNK) if threshold else []):
            for got in told:
                if isinstance(got, str):
                    raise DataError(f"the test set has a picture that cannot be read: {got}")
                known.append(got)
    groups = _train_rows(train, captions, found)
    done = 0
    if known:
        test = _joined(known)
        known.clear()  # some 9 KB a picture
        index = build(test.hashes)
        with mapped(_Hashed(train, all_variants=False), workers) as run:
            for told in run(chunked(groups.firsts, _CHUNK)):
                found.unreadable += [got for got in told if isinstance(got, str)]
                read = [got for got in told if not isinstance(got, str)]
                nearest = _nearest(_joined(read), test, index, threshold) if read else {}
                for pairs in groups[done : done + len(told)]:
                    if (first := int(pairs[0])) in nearest:
                        found.removed += [
                            Removed(number, "picture", *nearest[first]) for number in pairs.tolist()
                        ]
                done += len(told)
                tick(done, len(groups))
    # Both caption and picture may give a pair away: the picture, which comes last, is told.
    found.removed = [each for _, each in sorted({r.index: r for r in found.removed}.items())]
    return found


def claim_removed(
    out: str | Path, *, inputs: Iterable[str | Path] = (), overwrite: bool = False
) -> Path:
    """Check that the list may be written to ``out``; nothing is touched. Return it as a path.

    Raises:
        UsageError: see ``publish.claim``.
    """
    own = begins(json.dumps({"format": _FORMAT})[:-1].encode())
    return claim(out, file_by("data decontaminate", own), inputs=inputs, overwrite=overwrite)


def write_removed(found: Decontaminated, train: Source, against: Source, out: Path) -> None:
    """Write a JSON object for each pair to leave out; ``data pack --without`` takes the file.

    Raises:
        CNClipError: it cannot be written; what was there stays.
    """
    with (
        unwritable_named(out),
        published(out) as path,
        path.open("w", encoding="utf-8") as stream,
    ):
        head = {"format": _FORMAT, "train": found.train, "pairs": found.pairs}
        head |= {"against": found.against, "threshold": found.threshold}
        head |= {"min_caption": found.min_caption}
        stream.write(json.dumps(head, ensure_ascii=False) + "\n")
        for each in found.removed:
            told = asdict(each) | {
                "train": _told(train, each.index),
                "against": _told(against, each.against),
            }
            stream.write(json.dumps(told, ensure_ascii=False) + "\n")


def read_removed(path: Path, source: Source) -> npt.NDArray[np.int64]:
    """Return the numbers of the pairs that ``write_removed`` listed, in order.

    Raises:
        DataError: the file is another one, or was made for other data than ``source``.
    """
    try:
        lines = read_lines(path, MAX_FILE)
        head = read_json(lines[0])
        pairs = int(head["pairs"])
        indexes = np.array([read_json(line)["index"] for line in lines[1:]], dtype=np.int64)
        if len(indexes) and not 0 <= indexes.min() <= indexes.max() < pairs:
            raise IndexError("a pair that is none")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        raise DataError(f"{path} was not written by `cn-clip data decontaminate`") from None
    if pairs != len(source):
        raise DataError(
            f"{path} was made for {pairs:,} pairs of {head.get('train')}, and {source.name} holds "
            f"{len(source):,}; decontaminate this source"
        )
    return indexes


def write_page(found: Decontaminated, train: Source, against: Source, path: Path) -> None:
    """Write a page that shows removed pairs beside what they were found in."""
    rows = []
    for each in found.removed[:_SHOWN]:
        what = f"{each.distance} of 256 bits differ" if each.reason == "picture" else "same caption"
        cells = "".join(
            f"<td>{_figure(source, number)}</td>"
            for source, number in ((train, each.index), (against, each.against))
        )
        rows.append(f"<tr><td>{what}</td>{cells}</tr>")
    unreadable = "".join(f"<li>{escape(each)}</li>" for each in found.unreadable[:_SHOWN])
    parts = [
        f"<h1>{escape(found.train)} against {escape(found.against)}</h1>",
        f"<p>{len(found.removed):,} of {found.pairs:,} pairs are removed: {found.by_picture:,} "
        f"for their picture, {found.by_caption:,} for their caption alone. "
        f"{len(found.unreadable):,} pictures could not be compared. {found.test_images:,} test "
        f"pictures; at most {found.threshold} of 256 bits may differ; captions of "
        f"{found.min_caption} characters and more were compared.</p>",
        f"<table><tr><th></th><th>training</th><th>test</th></tr>{''.join(rows)}</table>",
        f"<h2>Could not be compared</h2><ul>{unreadable}</ul>" if unreadable else "",
    ]
    write_text(path, page("Removed from training", parts, "data decontaminate"))


@dataclass(frozen=True, slots=True)
class _Hashes:
    """Hashes (K, 36). Of each, (K,): the pair that its picture is of, and whether it is that of the
    picture without margins."""

    hashes: Hashes
    rows: npt.NDArray[np.int64]
    trimmed: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Hashed:
    """Hashes pictures by the numbers of their pairs; a sentence stands for what cannot be read."""

    source: Source
    all_variants: bool

    def __call__(self, indexes: npt.NDArray[np.int64]) -> list[_Hashes | str]:
        return [self._hash(index) for index in indexes.tolist()]

    def _hash(self, index: int) -> _Hashes | str:
        try:
            content = self.source.image(index)
            image = read_image(content, fast_decode=_DECODED, background="white")
        except CNClipError as error:
            return located(self.source, index, error)
        whole, inner = (
            [hash_image(form) for form in (variants(each) if self.all_variants else [each])]
            for each in (image, trimmed(image))
        )
        count = len(whole) + len(inner)
        return _Hashes(
            np.stack(whole + inner),
            np.full(count, index),
            np.arange(count) >= len(whole),
        )


def _joined(several: list[_Hashes]) -> _Hashes:
    return _Hashes(
        np.concatenate([each.hashes for each in several]),
        np.concatenate([each.rows for each in several]),
        np.concatenate([each.trimmed for each in several]),
    )


def _nearest(
    asked: _Hashes, test: _Hashes, index: HashIndex, threshold: int
) -> dict[int, tuple[int, int]]:
    """Return, by the pair of a training picture, the test pair that it is nearest to and the
    distance; nothing for pictures that are near none."""
    query, held, distances = search(index, asked.hashes, threshold)
    alike = asked.trimmed[query] == test.trimmed[held]
    rows = zip(
        asked.rows[query][alike].tolist(),
        test.rows[held][alike].tolist(),
        distances[alike].tolist(),
        strict=True,
    )
    by_distance = sorted(rows, key=lambda row: row[2], reverse=True)
    return {pair: (against, distance) for pair, against, distance in by_distance}


def _test_rows(against: Source, min_caption: int) -> tuple[npt.NDArray[np.int64], dict[int, int]]:
    """Return the first pair of each test picture, and a pair of each test caption by its digest."""
    images: dict[int, int] = {}
    captions: dict[int, int] = {}
    for index in range(len(against)):
        row = against.row(index)
        if row.image_id:  # a text may stand alone, and a picture too
            images.setdefault(id_digest(against, index, row.image_id), index)
        text = plain(row.text)
        if min_caption and len(text) >= min_caption:
            captions.setdefault(digest(text), index)
    return np.array(list(images.values()), dtype=np.int64), captions


def _train_rows(train: Source, captions: dict[int, int], found: Decontaminated) -> Groups:
    """Return the pairs of each training picture; note captions that the test set has."""
    pictures = np.zeros(len(train), dtype=np.uint64)
    readable = np.ones(len(train), dtype=bool)
    for index in range(len(train)):
        try:
            row = train.row(index)
        except DataError as error:
            readable[index] = False
            found.unreadable.append(str(error))
            continue
        pictures[index] = id_digest(train, index, row.image_id)
        same = captions.get(digest(plain(row.text))) if captions else None
        if same is not None:
            found.removed.append(Removed(index, "caption", same))
    rows = np.flatnonzero(readable)
    return grouped(rows, pictures[rows])


def _told(source: Source, index: int) -> dict[str, str]:
    row = source.row(index)
    told = {"image_id": row.image_id, "text_id": row.text_id, "text": row.text}
    return told | {"where": source.where(index)}


def _figure(source: Source, index: int) -> str:
    row = source.row(index)
    try:
        picture = f'<img src="{data_uri(thumbnail(source.image(index)))}" alt="">'
    except CNClipError:
        picture = "(not readable)" if row.image_id else "(a text without a picture)"
    caption = f"{escape(row.text)}<br><small>{escape(source.where(index))}</small>"
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"

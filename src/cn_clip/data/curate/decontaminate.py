"""Find training pairs that are also in a test set: near-duplicate images or equal captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from cn_clip.data.captions import digest, plain
from cn_clip.data.curate.grouping import RowGroups, group_rows
from cn_clip.data.curate.perceptual_hash import (
    THRESHOLD,
    Hashes,
    HashIndex,
    build_index,
    hash_image,
    mirrored_and_cropped,
    read_for_hash,
    search,
    without_margins,
)
from cn_clip.data.curate.row_keys import keys_of_source
from cn_clip.data.process_map import Progress, Workers, chunked, no_progress, parallel_map
from cn_clip.data.sources.base import Source, located
from cn_clip.data.sources.open import id_digest
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.files import MAX_FILE, read_lines
from cn_clip.format_version import FIELD, Format
from cn_clip.html.page import thumbnail, write_page
from cn_clip.outputs import claim, own_file, starts_with
from cn_clip.publish import atomic_file, map_write_errors
from cn_clip.text import read_json
from cn_clip.translation import _

_CHUNK = 128
_FORMAT = Format("data decontaminate", 1)  # first line of the list of removed pairs
_MAX_SHOWN = 200  # removed pairs in the report


@dataclass(frozen=True, slots=True)
class RemovedPair:
    """A training pair, and the test pair it matches."""

    index: int
    reason: Literal["image", "caption"]
    against: int
    """Index of the pair in the test set."""
    distance: int = 0
    """Differing bits of the 256-bit image hashes."""


@dataclass(slots=True)
class DecontaminationResult:
    """Removed training pairs; ``unreadable`` has a message for each image not compared."""

    train: str
    against: str
    pairs: int
    test_images: int = 0
    threshold: int = THRESHOLD
    min_caption: int = 0
    removed: list[RemovedPair] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def by_image(self) -> int:
        """Number of pairs removed for their image."""
        return sum(pair.reason == "image" for pair in self.removed)

    @property
    def by_caption(self) -> int:
        """Number of pairs removed for their caption alone."""
        return len(self.removed) - self.by_image


def decontaminate(
    train: Source,
    against: Source,
    *,
    threshold: int = THRESHOLD,
    min_caption: int = 5,
    workers: Workers = 0,
    on_progress: Progress = no_progress,
) -> DecontaminationResult:
    """Find the pairs of ``train`` that leak ``against``.

    All texts of a matching image are removed with it. Test images are also hashed mirrored and
    cropped by 5 %, and all images also without their one-colour margins, so such copies match.

    Args:
        train: the training pairs.
        against: the test set.
        threshold: maximum differing bits of two 256-bit hashes of the same image; 0 compares no
            images.
        min_caption: captions with fewer characters, punctuation excluded, are not compared:
            many cats are captioned 一只猫. 0 compares no captions.
        workers: worker processes, or workers of a cluster; 0 runs in this process.
        on_progress: called with (done, total) training images.

    Raises:
        UsageError: ``threshold`` is out of range.
        DataError: a test image is unreadable, so leaks could go unnoticed; or a worker died.
    """
    if not 0 <= threshold <= 128:
        raise UsageError(
            _("the threshold is {threshold} bits of 256; give 0 to 128", threshold=threshold)
        )
    result = DecontaminationResult(train.name, against.name, len(train), 0, threshold, min_caption)
    tests, captions = _test_rows(against, min_caption)
    result.test_images = len(tests)
    test_hashes: list[_ImageHashes] = []
    with parallel_map(_HashImages(against, variants=True), workers) as run:
        for chunk in run(chunked(tests, _CHUNK) if threshold else []):
            for hashes in chunk:
                if isinstance(hashes, str):
                    raise DataError(_("unreadable test image: {hashes}", hashes=hashes))
                test_hashes.append(hashes)
    groups = _train_rows(train, captions, result, workers)
    done = 0
    if test_hashes:
        test = _joined(test_hashes)
        test_hashes.clear()  # about 9 KB per image
        index = build_index(test.hashes)
        with parallel_map(_HashImages(train, variants=False), workers) as run:
            for chunk in run(chunked(groups.firsts, _CHUNK)):
                result.unreadable += [hashes for hashes in chunk if isinstance(hashes, str)]
                read = [hashes for hashes in chunk if not isinstance(hashes, str)]
                nearest = _nearest(_joined(read), test, index, threshold) if read else {}
                for pairs in groups[done : done + len(chunk)]:
                    if (first := int(pairs[0])) in nearest:
                        result.removed += [
                            RemovedPair(number, "image", *nearest[first])
                            for number in pairs.tolist()
                        ]
                done += len(chunk)
                on_progress(done, len(groups))
    # A pair may match by caption and by image: the image match, added last, is kept.
    result.removed = [pair for _, pair in sorted({r.index: r for r in result.removed}.items())]
    return result


def claim_removed(
    out: str | Path, *, inputs: Iterable[str | Path] = (), overwrite: bool = False
) -> Path:
    """Check that the list may be written to ``out``, without touching it. Return it as a path.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    own = starts_with(f'{{"{FIELD}": "cn-clip {_FORMAT.name} '.encode())  # any version
    check = own_file("data decontaminate", own)
    return claim(out, check, inputs=inputs, overwrite=overwrite)


def write_removed(result: DecontaminationResult, train: Source, against: Source, out: Path) -> None:
    """Write one JSON object per removed pair, the input of ``data pack --without``.

    Raises:
        CNClipError: the file cannot be written; an existing file stays unchanged.
    """
    with (
        map_write_errors(out),
        atomic_file(out) as path,
        path.open("w", encoding="utf-8") as stream,
    ):
        head = {FIELD: str(_FORMAT), "train": result.train, "pairs": result.pairs}
        head |= {"against": result.against, "threshold": result.threshold}
        head |= {"min_caption": result.min_caption}
        stream.write(json.dumps(head, ensure_ascii=False) + "\n")
        for pair in result.removed:
            values = asdict(pair) | {
                "train": _pair_json(train, pair.index),
                "against": _pair_json(against, pair.against),
            }
            stream.write(json.dumps(values, ensure_ascii=False) + "\n")


def read_removed(path: Path, source: Source) -> npt.NDArray[np.int64]:
    """Return the indexes (N,) of the pairs that ``write_removed`` listed, in order.

    Raises:
        DataError: the file is not such a list, of a newer version, or was made for other data
            than ``source``.
    """
    damaged = DataError(_("{path} was not written by `cn-clip data decontaminate`", path=path))
    try:
        lines = read_lines(path, MAX_FILE)
        head = read_json(lines[0])
    except OSError as error:
        raise DataError(
            _("{path} cannot be read: {reason}", path=path, reason=error.strerror)
        ) from None
    except (ValueError, LookupError, RecursionError):
        raise damaged from None
    if isinstance(head, dict):
        _FORMAT.check(head.get(FIELD), path, DataError, _("decontaminate again"))
    try:
        pairs = int(head["pairs"])
        indexes = np.array([read_json(line)["index"] for line in lines[1:]], dtype=np.int64)
        if len(indexes) and not 0 <= indexes.min() <= indexes.max() < pairs:
            raise IndexError("index out of range")
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        raise damaged from None
    if pairs != len(source):
        raise DataError(
            _(
                "{path} was made for {pairs:,} pairs of {train}, and {name} holds {pair_count:,}; "
                "decontaminate this source",
                path=path,
                pairs=pairs,
                train=head.get("train"),
                name=source.name,
                pair_count=len(source),
            )
        )
    return indexes


def write_removed_report(
    result: DecontaminationResult, train: Source, against: Source, path: Path
) -> None:
    """Write the HTML report: each removed pair next to the test pair it matches."""
    write_page(
        path,
        "data/curate/removed_report.html",
        _("Pairs removed from training"),
        _("data decontaminate"),
        result=result,
        removed=[
            (pair, _shown(train, pair.index), _shown(against, pair.against))
            for pair in result.removed[:_MAX_SHOWN]
        ],
        unreadable=result.unreadable[:_MAX_SHOWN],
    )


@dataclass(frozen=True, slots=True)
class _ImageHashes:
    """Hashes (K, 36); for each, (K,): the index of its pair, and whether it is the hash of the
    image without margins."""

    hashes: Hashes
    rows: npt.NDArray[np.int64]
    trimmed: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _HashImages:
    """Hash images by the indexes of their pairs; an unreadable image gives a message."""

    source: Source
    variants: bool

    def __call__(self, indexes: npt.NDArray[np.int64]) -> list[_ImageHashes | str]:
        return [self._hash(index) for index in indexes.tolist()]

    def _hash(self, index: int) -> _ImageHashes | str:
        try:
            content = self.source.image(index)
            image = read_for_hash(content)
        except CNClipError as error:
            return located(self.source, index, error)
        original, inner = (
            [hash_image(copy) for copy in (mirrored_and_cropped(base) if self.variants else [base])]
            for base in (image, without_margins(image))
        )
        count = len(original) + len(inner)
        return _ImageHashes(
            np.stack(original + inner),
            np.full(count, index),
            np.arange(count) >= len(original),
        )


def _joined(parts: list[_ImageHashes]) -> _ImageHashes:
    return _ImageHashes(
        np.concatenate([part.hashes for part in parts]),
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.trimmed for part in parts]),
    )


def _nearest(
    queries: _ImageHashes, test: _ImageHashes, index: HashIndex, threshold: int
) -> dict[int, tuple[int, int]]:
    """Map training pairs to the nearest test pair and its distance; pairs within ``threshold`` of
    none are left out. Hashes without margins are compared with each other only."""
    query, match, distances = search(index, queries.hashes, threshold)
    same_form = queries.trimmed[query] == test.trimmed[match]
    rows = zip(
        queries.rows[query][same_form].tolist(),
        test.rows[match][same_form].tolist(),
        distances[same_form].tolist(),
        strict=True,
    )
    by_distance = sorted(rows, key=lambda row: row[2], reverse=True)
    return {pair: (against, distance) for pair, against, distance in by_distance}


def _test_rows(against: Source, min_caption: int) -> tuple[npt.NDArray[np.int64], dict[int, int]]:
    """Return the first pair of each test image (K,), and caption digest -> first pair."""
    images: dict[int, int] = {}
    captions: dict[int, int] = {}
    for index in range(len(against)):
        row = against.row(index)
        if row.image_id:  # with ?unpaired=yes a text may have no image
            images.setdefault(id_digest(against, index, row.image_id), index)
        text = plain(row.text)
        if min_caption and len(text) >= min_caption:
            captions.setdefault(digest(text), index)
    return np.array(list(images.values()), dtype=np.int64), captions


def _train_rows(
    train: Source, captions: dict[int, int], result: DecontaminationResult, workers: Workers
) -> RowGroups:
    """Group the training pairs by image; add those whose caption is in ``captions``."""
    keys = keys_of_source(train, workers=workers)
    result.unreadable += keys.errors.values()
    readable = np.ones(len(train), dtype=bool)
    readable[list(keys.errors)] = False
    # The key of a caption with letters is the digest that ``captions`` has.
    wanted = np.fromiter(captions, np.uint64, len(captions))
    for index in np.flatnonzero(readable & np.isin(keys.captions, wanted)).tolist():
        same = captions[int(keys.captions[index])]
        result.removed.append(RemovedPair(index, "caption", same))
    rows = np.flatnonzero(readable)
    return group_rows(rows, keys.images[rows])


def _pair_json(source: Source, index: int) -> dict[str, str]:
    row = source.row(index)
    values = {"image_id": row.image_id, "text_id": row.text_id, "text": row.text}
    return values | {"where": source.where(index)}


def _shown(source: Source, index: int) -> dict[str, str | bytes | None]:
    """Return what the report shows of a pair; ``jpeg`` is None for an unreadable image."""
    row = source.row(index)
    try:
        jpeg = thumbnail(source.image(index))
    except CNClipError:
        jpeg = None
    return {"jpeg": jpeg, "image_id": row.image_id, "text": row.text, "where": source.where(index)}

"""Split a source into training, validation and test pairs, without leaks between them."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from cn_clip.data.curate.leak_groups import LeakGroups, group_leaks
from cn_clip.data.curate.perceptual_hash import DUPLICATE_THRESHOLD
from cn_clip.data.pack import pack
from cn_clip.data.process_map import Progress, no_progress
from cn_clip.data.sources.base import Source
from cn_clip.data.sources.open import image_file, parts_of
from cn_clip.errors import DataError, UsageError
from cn_clip.outputs import atomic_folder, claim, own_folder
from cn_clip.publish import map_write_errors
from cn_clip.text import path_text
from cn_clip.translation import _

COMMAND = "data split"
SplitFormat = Literal["csv", "tar"]
_COLUMNS = ("image", "caption", "image_id", "text_id")
_MIN_CAPTION = 5


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is held out: a fraction of the images below 1, or a number of them."""

    val: float = 0.1
    test: float = 0.0

    def images(self, total: int) -> dict[str, int]:
        """Return the number of images of each part that is held out, of ``total``.

        Raises:
            UsageError: a size is negative or not finite, or nothing is left for training.
        """
        counts = {}
        for name, size in (("val", self.val), ("test", self.test)):
            if not 0 <= size < 1 << 40 or (size >= 1 and size != round(size)):
                raise UsageError(
                    _(
                        "--{name} is {size:g}; give a fraction below 1, or a number of images",
                        name=name,
                        size=size,
                    )
                )
            counts[name] = round(size * total) if size < 1 else int(size)
            if size and not counts[name]:
                counts[name] = 1
        if sum(counts.values()) >= total:
            raise UsageError(
                _(
                    "--val {val:g} and --test {test:g} leave none of {total:,} images for "
                    "training; give less",
                    val=self.val,
                    test=self.test,
                    total=total,
                )
            )
        return {name: count for name, count in counts.items() if count}


DEFAULT_SIZES = Sizes()


@dataclass(frozen=True, slots=True)
class Part:
    """What a part of a split holds, and its source."""

    images: int
    pairs: int
    source: str


@dataclass(slots=True)
class SplitResult:
    """The parts by name; how many images and captions kept images together; a message for each
    pair that is left out."""

    out: str
    to: SplitFormat
    parts: dict[str, Part] = field(default_factory=dict)
    near_duplicates: int = 0
    equal_captions: int = 0
    skipped: list[str] = field(default_factory=list)


def claim_split(
    out: str | os.PathLike[str],
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> Path:
    """Check that a split may be written to a folder, without touching it. Return it as a path.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    check = own_folder(COMMAND)
    return claim(out, check, kind="folder", inputs=inputs, overwrite=overwrite)


def split(
    source: Source,
    out: str | os.PathLike[str],
    *,
    sizes: Sizes = DEFAULT_SIZES,
    to: SplitFormat | None = None,
    seed: int = 0,
    threshold: int = DUPLICATE_THRESHOLD,
    min_caption: int = _MIN_CAPTION,
    workers: int = 0,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
    on_progress: Progress = no_progress,
) -> SplitResult:
    """Write the pairs of a source to ``train``, ``val`` and ``test`` in the folder ``out``.

    All texts of an image, near-duplicate images, and images with an equal caption are on one side.
    The same data and seed give the same split, in any order of the rows.

    Args:
        source: from ``open_source``.
        out: the folder, of ``train.csv`` and so on, or of folders ``train`` of tar shards.
        sizes: of what is held out, in images.
        to: "csv" names the images where they are; "tar" copies them. By default csv if all images
            are files of their own.
        seed: chooses the images that are held out.
        threshold: maximum differing bits of two 256-bit hashes of near-duplicates; 0 compares no
            images.
        min_caption: captions with fewer characters, punctuation excluded, are not compared; 0
            compares none.
        workers: number of worker processes; 0 runs in this process.
        inputs: files and folders of the source; none of them may be overwritten.
        overwrite: replace what this function wrote to ``out``.
        on_progress: called with (done, total) images.

    Raises:
        UsageError: ``out`` exists, is an input or holds other files; a size or the threshold is out
            of range; the images hang together so that nothing can be held out.
        DataError: no pair is usable, or a worker died.
        CNClipError: the disk is full; nothing is written then.
    """
    if not 0 <= threshold <= 128:
        raise UsageError(
            _("the threshold is {threshold} bits of 256; give 0 to 128", threshold=threshold)
        )
    if not len(source):
        raise UsageError(_("{name} holds no pair", name=source.name))
    out = claim_split(out, inputs=inputs, overwrite=overwrite)
    leaks = group_leaks(
        source,
        threshold=threshold,
        min_caption=min_caption,
        workers=workers,
        on_progress=on_progress,
    )
    if not len(leaks.rows):
        raise DataError(
            _(
                "{name} has no usable pair; the first: {first}",
                name=source.name,
                first=leaks.skipped[0],
            )
        )
    parts = _assign(leaks, sizes.images(len(leaks.rows)), seed)
    result = SplitResult(
        str(out), to or _format_for(source, leaks), {}, leaks.near_duplicates, leaks.equal_captions
    )
    result.skipped += leaks.skipped
    with map_write_errors(out), atomic_folder(out, COMMAND) as folder:
        for name, images in parts.items():
            rows = np.sort(np.concatenate([leaks.rows[image] for image in images.tolist()]))
            if result.to == "csv":
                path = _write_csv(source, rows, folder / f"{name}.csv", Path(os.path.realpath(out)))
            else:
                path = _write_tars(source, rows, folder / name, result, workers)
            uri = f"{result.to}:{Path(out) / path.relative_to(folder)}"
            result.parts[name] = Part(len(images), len(rows), uri)
    return result


def _assign(
    leaks: LeakGroups, wanted: Mapping[str, int], seed: int
) -> dict[str, npt.NDArray[np.int64]]:
    """Return the numbers of the images of each part.

    Groups are taken in an order given by the ids of their images and the seed; one that does not
    fit into what is held out any more goes to training.

    Raises:
        UsageError: no group fits into a part.
    """
    count = len(leaks.groups)
    keys = np.full(count, np.iinfo(np.uint64).max)
    np.minimum.at(keys, leaks.groups, _mixed(leaks.keys, seed))
    sizes = np.bincount(leaks.groups, minlength=count)
    groups = np.flatnonzero(sizes)
    part_of_group = np.zeros(count, np.int64)
    left = list(wanted.values())
    for group in groups[np.argsort(keys[groups], kind="stable")].tolist():
        size = int(sizes[group])
        part = next((number for number, room in enumerate(left) if size <= room), None)
        if part is not None:
            part_of_group[group] = part + 1
            left[part] -= size
        if not any(left):
            break
    part_of_image = part_of_group[leaks.groups]
    parts = {
        name: np.flatnonzero(part_of_image == number)
        for number, name in enumerate(("train", *wanted))
    }
    for name, images in parts.items():
        if not len(images):
            raise UsageError(
                _(
                    "no group of images fits into {name}: near-duplicates and equal captions join "
                    "{largest:,} of {count:,} images; raise --min-caption, or lower --threshold",
                    name=name,
                    largest=int(sizes.max()),
                    count=count,
                )
            )
    return parts


def _mixed(keys: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Return keys in another random order for each seed (SplitMix64's finalizer)."""
    mixed = keys ^ np.uint64(seed * 0x9E3779B97F4A7C15 % (1 << 64))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _format_for(source: Source, leaks: LeakGroups) -> SplitFormat:
    files = (image_file(source, index) for index in leaks.rows.firsts.tolist())
    named = all(file is not None and path_text(file) == str(file) for file in files)
    return "csv" if named else "tar"


def _write_csv(source: Source, rows: npt.NDArray[np.int64], path: Path, final: Path) -> Path:
    """Write a table of pairs, with paths relative to the folder ``final`` that it will be in.

    It starts with a byte order mark, without which Excel does not read it as UTF-8.
    """
    columns = _COLUMNS if len(parts_of(source)) == 1 else _COLUMNS[:2]
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        for index in rows.tolist():
            row = source.row(index)
            file = image_file(source, index)
            if file is None or path_text(file) != str(file):
                raise UsageError(
                    _(
                        "{where}: the image has no path that a CSV can name; give --to tar",
                        where=source.where(index),
                    )
                )
            image = _relative(Path(os.path.realpath(file)), final)
            writer.writerow((image, row.text, row.image_id, row.text_id)[: len(columns)])
    return path


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return path.as_posix()


def _write_tars(
    source: Source, rows: npt.NDArray[np.int64], folder: Path, result: SplitResult, workers: int
) -> Path:
    without = np.ones(len(source), dtype=bool)
    without[rows] = False
    packed = pack(source, folder, without=np.flatnonzero(without), workers=workers)
    result.skipped += packed.skipped
    return folder / "*.tar"

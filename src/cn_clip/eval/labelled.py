"""Labelled pictures in the official layout: ``label_cn.txt``, and a folder a class."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cn_clip.errors import DataError
from cn_clip.files import MAX_TEXT, read_file, read_lines, skipped_files, walk
from cn_clip.image.decode import SUFFIXES
from cn_clip.text import read_json

LABELS = "label_cn.txt"


@dataclass(frozen=True, slots=True)
class Labelled:
    """Pictures and their classes.

    Attributes:
        labels: the M labels, of which some may be equal.
        images: the N pictures, by folder, then by name, as torchvision's ``ImageFolder`` has them.
        truth: the class of each, (N,).
        relevant: all classes that each shows, (N, M); None where only ``truth`` is known.
        order: the rows that a submission to ELEVATER wants, in its order; None for that of
            ``images``.
    """

    labels: list[str]
    images: list[Path]
    truth: npt.NDArray[np.int64]
    relevant: npt.NDArray[np.bool_] | None = None
    order: npt.NDArray[np.int64] | None = None


def read_labelled(root: Path, *, split: str = "test", truth: Path | None = None) -> Labelled:
    """Read a folder in the layout of the official ``zeroshot_dataset.md``; no picture is opened.

    Args:
        root: holds ``label_cn.txt``, the folder of the split, and ``index.json`` if a submission
            wants the pictures in another order.
        split: ``test`` or ``train``.
        truth: a list of all labels of each picture, for pictures that show several classes: lines
            of a path and class numbers from 0, ``test.zip@000001.jpg 3,7``, as ELEVATER's
            ``test_ic.txt`` has them. Pictures go by their file name.

    Raises:
        DataError: a file or folder is missing, a class has no picture, labels and folders are not
            equally many, or ``index.json`` or ``truth`` does not fit the pictures.
    """
    labels = _read_labels(root / LABELS)
    place = root / split
    if not place.is_dir():
        raise DataError(f"no folder {place}; put a folder a class there, such as {split}/000")
    folders = _class_folders(place, len(labels))
    images: list[Path] = []
    beside: list[Path] = []
    classes: list[int] = []
    for number, folder in enumerate(folders):
        listing = walk(folder)
        found = [each for each in listing.files if each.suffix.lower() in SUFFIXES]
        beside += listing.files
        if not found:
            raise DataError(
                f"the class folder {folder} ({labels[number]}) holds no picture "
                f"({', '.join(SUFFIXES)}); add some, or remove the folder and its label"
            )
        found.sort(key=lambda each: (str(each.parent), each.name))
        images += found
        classes += [number] * len(found)
    if passed := skipped_files(beside, SUFFIXES, place):
        warnings.warn(passed, stacklevel=2)
    return Labelled(
        labels,
        images,
        np.array(classes, np.int64),
        None if truth is None else _read_truth(truth, images, len(labels)),
        _read_order(root / "index.json", len(images)) if split == "test" else None,
    )


def _read_labels(path: Path) -> list[str]:
    try:
        lines = read_lines(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; write one Chinese label a line there"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    labels = [line.strip() for line in lines]
    while labels and not labels[-1]:
        labels.pop()
    if "" in labels:
        raise DataError(f"{path}, line {labels.index('') + 1} is empty; lines are classes")
    if len(labels) < 2:
        raise DataError(f"{path} holds {len(labels)} label; write at least two, one a line")
    first: dict[str, int] = {}
    for at, label in enumerate(labels, 1):
        if label in first:  # translations do that; the rest of the set is worth measuring
            warnings.warn(
                f"{path}: lines {first[label]} and {at} are both {label!r}, so the second class is "
                "never the best; tell them apart",
                stacklevel=3,
            )
        first.setdefault(label, at)
    return labels


def _class_folders(place: Path, count: int) -> list[Path]:
    """Return the folders in the order of their labels: by number if all are numbers."""
    folders = sorted((each for each in place.iterdir() if each.is_dir()), key=lambda f: f.name)
    if len(folders) != count:
        more = "labels than folders" if count > len(folders) else "folders than labels"
        raise DataError(
            f"{count} labels in {LABELS}, but {len(folders)} class folders in {place}, so more "
            f"{more}; line n, counted from 0, is the label of folder n"
        )
    if all(each.name.isdecimal() for each in folders):
        folders.sort(key=lambda each: int(each.name))
        for number, folder in enumerate(folders):
            if int(folder.name) != number:
                raise DataError(
                    f"{folder} stands where class {number} should; number the folders from 0, "
                    "without gaps"
                )
    return folders


def _read_order(path: Path, count: int) -> npt.NDArray[np.int64] | None:
    if not path.exists():
        return None
    try:
        rows = read_json(read_file(path, MAX_TEXT))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; it lists rows of pictures") from None
    if not isinstance(rows, list) or sorted(map(str, rows)) != sorted(map(str, range(count))):
        raise DataError(
            f"{path} does not list each of the {count:,} pictures once, by number from 0; it "
            "belongs to other pictures"
        )
    return np.array(rows, np.int64)


def _read_truth(path: Path, images: list[Path], classes: int) -> npt.NDArray[np.bool_]:
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    told: dict[str, list[int]] = {}
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(.+\S)\s+(\d{1,9}(?:,\d{1,9})*)", line.strip())
        numbers = [int(each) for each in match[2].split(",")] if match else [classes]
        if match is None or max(numbers) >= classes:
            raise DataError(
                f"{path}, line {at}: {line.strip()!r:.60} is not a picture and class numbers below "
                f"{classes}, such as 000001.jpg 3,7"
            )
        told[re.split("[@/\\\\]", match[1])[-1]] = numbers
    relevant = np.zeros((len(images), classes), bool)
    for row, image in enumerate(images):
        if image.name not in told:
            raise DataError(f"{path} does not tell the labels of {image.name} ({image})")
        relevant[row, told[image.name]] = True
    return relevant

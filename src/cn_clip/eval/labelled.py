"""Labelled images in the official layout: ``label_cn.txt`` and one folder per class."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cn_clip.errors import DataError
from cn_clip.files import MAX_TEXT, of_suffixes, read_file, read_lines, skipped_files, walk
from cn_clip.image.decode import SUFFIXES
from cn_clip.text import read_json
from cn_clip.translation import _

LABELS = "label_cn.txt"


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images and their classes.

    Attributes:
        labels: the M labels, which may repeat.
        images: paths of the N images, by folder, then by name, as in torchvision's ``ImageFolder``.
        truth: the class of each image, (N,).
        relevant: whether an image shows a class, (N, M); None if only ``truth`` is known.
        order: rows of ``images`` in the order of a submission to ELEVATER; None for their own.
    """

    labels: list[str]
    images: list[Path]
    truth: npt.NDArray[np.int64]
    relevant: npt.NDArray[np.bool_] | None = None
    order: npt.NDArray[np.int64] | None = None


def read_labelled(root: Path, *, split: str = "test", truth: Path | None = None) -> LabelledImages:
    """Read a folder in the layout of the official ``zeroshot_dataset.md``; no image is opened.

    Args:
        root: folder with ``label_cn.txt``, the folder of the split, and ``index.json`` if a
            submission needs another order of the images.
        split: ``test`` or ``train``.
        truth: file with all labels of each image, for images with several classes: lines of a path
            and class numbers from 0, ``test.zip@000001.jpg 3,7``, as in ELEVATER's
            ``test_ic.txt``. Images are matched by file name.

    Raises:
        DataError: a file or folder is missing, a class has no image, the numbers of labels and
            folders differ, or ``index.json`` or ``truth`` does not match the images.
    """
    order = root / "index.json" if split == "test" else None
    return read_split(
        root / split,
        root / LABELS,
        truth=truth,
        order=order if order is not None and order.exists() else None,
    )


def read_split(
    split_folder: Path, labels_file: Path, *, truth: Path | None = None, order: Path | None = None
) -> LabelledImages:
    """Read a folder with one folder of images per class; no image is opened.

    Args:
        split_folder: the folder.
        labels_file: the labels, one per line.
        truth: as for ``read_labelled``.
        order: JSON list of the numbers of all images, in the order of a submission.

    Raises:
        DataError: see ``read_labelled``.
    """
    labels = _read_labels(labels_file)
    if not split_folder.is_dir():
        raise DataError(
            _(
                "no folder {split_folder}; create it with one folder per class, such as "
                "{split}/000",
                split_folder=split_folder,
                split=split_folder.name,
            )
        )
    folders = _class_folders(split_folder, len(labels), labels_file)
    images: list[Path] = []
    files: list[Path] = []
    classes: list[int] = []
    for number, folder in enumerate(folders):
        listing = walk(folder)
        paths = of_suffixes(listing.files, SUFFIXES)
        files += listing.files
        if not paths:
            raise DataError(
                _(
                    "the class folder {folder} ({label}) has no image ({suffixes}); add some, or "
                    "remove the folder and its label",
                    folder=folder,
                    label=labels[number],
                    suffixes=", ".join(SUFFIXES),
                )
            )
        paths.sort(key=lambda path: (str(path.parent), path.name))
        images += paths
        classes += [number] * len(paths)
    if passed := skipped_files(files, SUFFIXES, split_folder):
        warnings.warn(passed, stacklevel=2)
    return LabelledImages(
        labels,
        images,
        np.array(classes, np.int64),
        None if truth is None else _read_truth(truth, images, len(labels)),
        None if order is None else _read_order(order, len(images)),
    )


def _read_labels(path: Path) -> list[str]:
    try:
        lines = read_lines(path)
    except OSError as error:
        raise DataError(
            _(
                "{path} cannot be read: {reason}; write one Chinese label per line there",
                path=path,
                reason=error.strerror,
            )
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            _(
                "{path} is not UTF-8 (byte {position}); save it as UTF-8",
                path=path,
                position=error.start,
            )
        ) from None
    labels = [line.strip() for line in lines]
    while labels and not labels[-1]:
        labels.pop()
    if "" in labels:
        raise DataError(
            _(
                "{path}, line {line} is empty; write the label of that class",
                path=path,
                line=labels.index("") + 1,
            )
        )
    if len(labels) < 2:
        raise DataError(
            _(
                "{path} has {label_count} label; write at least two, one per line",
                path=path,
                label_count=len(labels),
            )
        )
    first: dict[str, int] = {}
    for line, label in enumerate(labels, 1):
        if label in first:  # not an error: the official translations have such duplicates
            warnings.warn(
                _(
                    "{path}: lines {first_line} and {line} are both {label!r}, so the second "
                    "class is never predicted; make the labels different",
                    path=path,
                    first_line=first[label],
                    line=line,
                    label=label,
                ),
                stacklevel=3,
            )
        first.setdefault(label, line)
    return labels


def _class_folders(split_folder: Path, count: int, labels_file: Path) -> list[Path]:
    """Return the folders in the order of their labels: by number if all are numbers."""
    folders = sorted((f for f in split_folder.iterdir() if f.is_dir()), key=lambda f: f.name)
    if len(folders) != count:
        more = _("labels than folders") if count > len(folders) else _("folders than labels")
        raise DataError(
            _(
                "more {more}: {count} in {file}, {folder_count} class folders in {split_folder}; "
                "line n, counted from 0, is the label of folder n",
                more=more,
                count=count,
                file=labels_file.name,
                folder_count=len(folders),
                split_folder=split_folder,
            )
        )
    if all(folder.name.isdecimal() for folder in folders):
        folders.sort(key=lambda folder: int(folder.name))
        for number, folder in enumerate(folders):
            if int(folder.name) != number:
                raise DataError(
                    _(
                        "{folder} is in the position of class {number}; number the folders from 0 "
                        "without gaps",
                        folder=folder,
                        number=number,
                    )
                )
    return folders


def _read_order(path: Path, count: int) -> npt.NDArray[np.int64]:
    try:
        rows = read_json(read_file(path, MAX_TEXT))
    except (OSError, ValueError) as error:
        raise DataError(
            _(
                "{path} is unreadable: {error}; give a JSON list of image numbers",
                path=path,
                error=error,
            )
        ) from None
    if not isinstance(rows, list) or sorted(map(str, rows)) != sorted(map(str, range(count))):
        raise DataError(
            _(
                "{path} does not list each of the {count:,} images once, by number from 0; give "
                "the file of these images",
                path=path,
                count=count,
            )
        )
    return np.array(rows, np.int64)


def _read_truth(path: Path, images: list[Path], classes: int) -> npt.NDArray[np.bool_]:
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            _("{path} is unreadable: {error}; give ELEVATER's test_ic.txt", path=path, error=error)
        ) from None
    classes_of: dict[str, list[int]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(.+\S)\s+(\d{1,9}(?:,\d{1,9})*)", line.strip())
        shown = [int(digits) for digits in match[2].split(",")] if match else [classes]
        if match is None or max(shown) >= classes:
            raise DataError(
                _(
                    "{path}, line {number}: {line!r:.60} is not an image with class numbers below "
                    "{classes}, such as 000001.jpg 3,7",
                    path=path,
                    number=number,
                    line=line.strip(),
                    classes=classes,
                )
            )
        classes_of[re.split("[@/\\\\]", match[1])[-1]] = shown
    relevant = np.zeros((len(images), classes), bool)
    for row, image in enumerate(images):
        if image.name not in classes_of:
            raise DataError(
                _(
                    "{path} has no line for {name} ({image}); add one",
                    path=path,
                    name=image.name,
                    image=image,
                )
            )
        relevant[row, classes_of[image.name]] = True
    return relevant

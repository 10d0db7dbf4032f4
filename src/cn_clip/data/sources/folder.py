"""A folder of images, each with a ``.txt`` of its captions beside it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cn_clip.data.sources.base import Row
from cn_clip.errors import DataError
from cn_clip.files import MAX_TEXT, passed_over, read_file, walk
from cn_clip.image.decode import SUFFIXES
from cn_clip.text import path_text


class Folder:
    """Every line of ``cat.txt`` is a caption of ``cat.jpg``; its id is the path without suffix,
    or with it where ``cat.png`` is there too. Linked folders are searched as well."""

    def __init__(self, name: str, root: Path, encoding: str | None = None) -> None:
        if not root.is_dir():
            raise DataError(f"{name}: no such folder: {root}")
        self.name = name
        self._encoding = encoding or "utf-8"
        listing = walk(root)
        self._images = [each for each in listing.files if each.suffix.lower() in SUFFIXES]
        self._ids = _ids(root, self._images)
        self._pairs: list[tuple[int, int]] = []  # number of the image, number of the caption
        self._unmatched = list(listing.closed)
        if passed := passed_over(listing.files, SUFFIXES, root):
            warnings.warn(passed, stacklevel=2)
            self._unmatched.append(passed)
        for number, image in enumerate(self._images):
            if not image.with_suffix(".txt").is_file():
                self._unmatched.append(f"{path_text(image)} has no {image.stem}.txt beside it")
                continue
            try:
                lines = _lines(image)
            except OSError:  # a row, which says so when it is read
                lines = [b""]
            # Counted in bytes: captions that cannot be decoded are rows too, and named as such.
            self._pairs += [(number, at) for at, line in enumerate(lines) if line.strip() or not at]
        pictured = {image.with_suffix(".txt") for image in self._images}
        for text in listing.files:
            if text.suffix == ".txt" and text not in pictured:
                self._unmatched.append(f"{path_text(text)} has no picture beside it")
        if not self._pairs:
            raise DataError(
                f"{name}: no picture in {root} has a .txt of the same name beside it"
                + (f"; {passed}" if passed else "")
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def row(self, index: int) -> Row:
        number, at = self._pairs[index]
        try:
            line = _lines(self._images[number])[at]
            text = line.decode("utf-8-sig" if self._encoding == "utf-8" else self._encoding)
        except (OSError, IndexError) as error:
            reason = getattr(error, "strerror", None) or "the file has changed"
            raise DataError(f"{self.where(index)} cannot be read: {reason}") from None
        except (UnicodeError, LookupError):
            raise DataError(
                f"{self.where(index)} is not {self._encoding}; save it as UTF-8, or name its "
                "encoding with ?encoding=gb18030"
            ) from None
        image_id = self._ids[number]
        return Row(text.strip(), image_id, image_id if not at else f"{image_id}#{at}")

    def image(self, index: int) -> bytes:
        image = self._images[self._pairs[index][0]]
        try:
            return read_file(image)
        except OSError as error:
            raise DataError(f"{image} cannot be read: {error.strerror}") from None

    def where(self, index: int) -> str:
        number, at = self._pairs[index]
        return f"{path_text(self._images[number].with_suffix('.txt'))}, line {at + 1}"

    def unmatched(self) -> list[str]:
        return self._unmatched


def _ids(root: Path, images: Sequence[Path]) -> list[str]:
    """Return an id for each image: its path without suffix, if no other image has that."""
    whole = [path_text(image.relative_to(root).as_posix()) for image in images]
    stems = [path_text(image.relative_to(root).with_suffix("").as_posix()) for image in images]
    counts, taken = Counter(stems), set(whole)
    return [
        stem if counts[stem] == 1 and stem not in taken else name
        for stem, name in zip(stems, whole, strict=True)
    ]


def _lines(image: Path) -> list[bytes]:
    return read_file(image.with_suffix(".txt"), MAX_TEXT).splitlines() or [b""]

"""A folder of images, each with its captions in a ``.txt`` of the same name."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cn_clip.data.sources.base import Row
from cn_clip.errors import DataError
from cn_clip.files import MAX_TEXT, of_suffixes, read_file, skipped_files, walk
from cn_clip.image.decode import SUFFIXES
from cn_clip.image.limits import MAX_ENCODED
from cn_clip.text import path_text
from cn_clip.translation import _


class Folder:
    """The lines of ``cat.txt`` are the captions of ``cat.jpg``. The image id is its path without
    suffix, or with it if ``cat.png`` exists too. Linked folders are searched too."""

    def __init__(self, name: str, root: Path, encoding: str | None = None) -> None:
        if not root.is_dir():
            raise DataError(_("{name}: no such folder: {folder}", name=name, folder=root))
        self.name = name
        self._encoding = encoding or "utf-8"
        listing = walk(root)
        self._images = of_suffixes(listing.files, SUFFIXES)
        self._ids = _ids(root, self._images)
        self._pairs: list[tuple[int, int]] = []  # (image, line)
        self._unmatched = list(listing.unreadable)
        if skipped := skipped_files(listing.files, SUFFIXES, root):
            warnings.warn(skipped, stacklevel=2)
            self._unmatched.append(skipped)
        for number, image in enumerate(self._images):
            if not image.with_suffix(".txt").is_file():
                self._unmatched.append(
                    _(
                        "{image} has no {name}.txt next to it",
                        image=path_text(image),
                        name=image.stem,
                    )
                )
                continue
            try:
                lines = _caption_lines(image)
            except OSError:  # row() reports it
                lines = [b""]
            # Bytes, not text: row() reports captions in another encoding.
            self._pairs += [(number, at) for at, line in enumerate(lines) if line.strip() or not at]
        captions = {image.with_suffix(".txt") for image in self._images}
        for text in of_suffixes(listing.files, (".txt",)):
            if text.suffix == ".txt" and text not in captions:
                self._unmatched.append(_("{text} has no image next to it", text=path_text(text)))
        if not self._pairs:
            raise DataError(
                _(
                    "{name}: no image in {folder} has a .txt of the same name next to it",
                    name=name,
                    folder=root,
                )
                + (f"; {skipped}" if skipped else "")
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def row(self, index: int) -> Row:
        number, at = self._pairs[index]
        try:
            line = _caption_lines(self._images[number])[at]
            text = line.decode("utf-8-sig" if self._encoding == "utf-8" else self._encoding)
        except (OSError, IndexError) as error:
            reason = getattr(error, "strerror", None) or _("the file has changed")
            raise DataError(
                _("{where} cannot be read: {reason}", where=self.where(index), reason=reason)
            ) from None
        except (ValueError, LookupError):
            raise DataError(
                _(
                    "{where} is not {encoding}; save it as UTF-8, or set its encoding with "
                    "?encoding=gb18030",
                    where=self.where(index),
                    encoding=self._encoding,
                )
            ) from None
        image_id = self._ids[number]
        return Row(text.strip(), image_id, image_id if not at else f"{image_id}#{at}")

    def file(self, index: int) -> Path:
        """Return the path of an image."""
        return self._images[self._pairs[index][0]]

    def image(self, index: int) -> bytes:
        image = self.image_path(index)
        try:
            return read_file(image, MAX_ENCODED)
        except OSError as error:
            raise DataError(
                _("{image} cannot be read: {reason}", image=image, reason=error.strerror)
            ) from None

    def image_path(self, index: int) -> Path:
        """Return the path of a pair's image."""
        return self._images[self._pairs[index][0]]

    def where(self, index: int) -> str:
        number, at = self._pairs[index]
        return _(
            "{path}, line {line}",
            path=path_text(self._images[number].with_suffix(".txt")),
            line=at + 1,
        )

    def unmatched(self) -> list[str]:
        return self._unmatched


def _ids(root: Path, images: Sequence[Path]) -> list[str]:
    """Return the image ids: paths without suffix, if unique, otherwise with suffix."""
    names = [path_text(image.relative_to(root).as_posix()) for image in images]
    stems = [path_text(image.relative_to(root).with_suffix("").as_posix()) for image in images]
    counts, taken = Counter(stems), set(names)
    return [
        stem if counts[stem] == 1 and stem not in taken else name
        for stem, name in zip(stems, names, strict=True)
    ]


def _caption_lines(image: Path) -> list[bytes]:
    return read_file(image.with_suffix(".txt"), MAX_TEXT).splitlines() or [b""]

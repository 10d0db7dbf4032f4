"""A folder of pictures, each with a ``.txt`` of its captions beside it."""

from __future__ import annotations

from pathlib import Path

from cn_clip.data.pair import Row
from cn_clip.errors import DataError
from cn_clip.image import find_images


class Folder:
    """Every line of ``cat.txt`` is a caption of ``cat.jpg``; its id is the path without suffix."""

    def __init__(self, name: str, root: Path, encoding: str | None = None) -> None:
        if not root.is_dir():
            raise DataError(f"{name}: no such folder: {root}")
        self.name = name
        self._root, self._encoding = root, encoding or "utf-8"
        self._images = find_images([root])
        self._pairs: list[tuple[int, int]] = []  # number of the picture, number of the caption
        self._unmatched: list[str] = []
        for number, image in enumerate(self._images):
            if not image.with_suffix(".txt").is_file():
                self._unmatched.append(f"{image} has no {image.stem}.txt beside it")
                continue
            # Counted in bytes: captions that cannot be decoded are rows too, and named as such.
            lines = image.with_suffix(".txt").read_bytes().splitlines() or [b""]
            self._pairs += [(number, at) for at, line in enumerate(lines) if line.strip() or not at]
        pictured = {image.with_suffix(".txt") for image in self._images}
        for text in sorted(set(root.rglob("*.txt")) - pictured):
            self._unmatched.append(f"{text} has no picture beside it")
        if not self._pairs:
            raise DataError(f"{name}: no picture in {root} has a .txt of the same name beside it")

    def __len__(self) -> int:
        return len(self._pairs)

    def row(self, index: int) -> Row:
        number, at = self._pairs[index]
        image = self._images[number]
        image_id = image.relative_to(self._root).with_suffix("").as_posix()
        lines = image.with_suffix(".txt").read_bytes().splitlines() or [b""]
        try:
            text = lines[at].decode("utf-8-sig" if self._encoding == "utf-8" else self._encoding)
        except (UnicodeDecodeError, LookupError):
            raise DataError(
                f"{self.where(index)} is not {self._encoding}; save it as UTF-8, or name its "
                "encoding with ?encoding=gb18030"
            ) from None
        return Row(text.strip(), image_id, image_id if not at else f"{image_id}#{at}")

    def image(self, index: int) -> bytes:
        image = self._images[self._pairs[index][0]]
        try:
            return image.read_bytes()
        except OSError as error:
            raise DataError(f"{image} cannot be read: {error.strerror}") from None

    def where(self, index: int) -> str:
        number, at = self._pairs[index]
        return f"{self._images[number].with_suffix('.txt')}, line {at + 1}"

    def unmatched(self) -> list[str]:
        return self._unmatched

"""One image or text to embed."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

from cn_clip.text import path_text


@dataclass(frozen=True, slots=True)
class Item:
    """One image or text.

    Attributes:
        content: the path of an image, its bytes, or a text.
        stamp: changes when the content changes.
        where: location for messages.
    """

    id: str | int
    content: str | Path | bytes
    stamp: str
    where: str

    @property
    def label(self) -> str:
        """The path of an image, its id if it has no file of its own, or the text."""
        return path_text(str(self.id if isinstance(self.content, bytes) else self.content))

    def reason(self, error: Exception) -> str:
        """Return why the image is unreadable, with its location."""
        return f"{self.where}: {error}" if isinstance(self.content, bytes) else str(error)


def file_item(path: Path, name: str, where: str) -> Item:
    """Return the image in a file; its id is ``name``."""
    return Item(path_text(name), path, file_stamp(path), path_text(where))


def file_stamp(path: Path) -> str:
    """Return what changes when a file changes; ``missing`` if it does not exist."""
    try:
        status = path.stat()
        return f"{status.st_size}-{status.st_mtime_ns}"
    except (OSError, ValueError):
        return "missing"  # reported when the image is read


def stamp_of(content: bytes) -> str:
    """Return the stamp of bytes: their length and CRC-32."""
    return f"{len(content)}-{zlib.crc32(content):08x}"

"""The thumbnails of a library: one file for each image, named by the digest of its content."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cn_clip.publish import map_write_errors
from cn_clip.text import path_text

THUMBNAILS = "thumbnails"
_TEMPORARY = ".tmp"  # in the folder itself, where there are few files


def thumbnail_path(library: Path, digest: bytes) -> Path:
    """Return the path of an image's thumbnail; it may not exist."""
    name = digest.hex()
    return library / THUMBNAILS / name[:2] / f"{name}.webp"


def write_thumbnail(library: Path, digest: bytes, content: bytes) -> None:
    """Write a thumbnail, unless it exists. It is not synced: a damaged one can be made again."""
    path = thumbnail_path(library, digest)
    if path.exists():
        return
    with map_write_errors(path_text(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two threads may decode copies of one image at the same time.
        name = f"{os.getpid()}-{threading.get_ident()}{_TEMPORARY}"
        temporary = library / THUMBNAILS / name
        temporary.write_bytes(content)
        os.replace(temporary, path)


def remove_thumbnail(library: Path, digest: bytes) -> None:
    """Delete a thumbnail, if there is one.

    Raises:
        CNClipError: it cannot be deleted.
    """
    path = thumbnail_path(library, digest)
    with map_write_errors(path_text(path)):
        path.unlink(missing_ok=True)


def sweep_thumbnails(library: Path) -> None:
    """Delete what killed processes left. A reader that is writing one now makes it again later."""
    for path in (library / THUMBNAILS).glob(f"*{_TEMPORARY}"):
        with suppress(OSError):
            path.unlink()


def stored_thumbnails(library: Path) -> Iterator[tuple[Path, bytes | None]]:
    """Yield the path of each file among the thumbnails, and the digest in its name, if any."""
    for path in sorted((library / THUMBNAILS).glob("*/*")):
        digest = None
        if path.suffix == ".webp":
            with suppress(ValueError):
                digest = bytes.fromhex(path.stem)
        yield path, digest

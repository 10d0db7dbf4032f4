"""The images of a library by their ids: their files and thumbnails."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from typing import Literal

from cn_clip.errors import CNClipError, LibraryError
from cn_clip.search.folder import LibraryFolder
from cn_clip.search.reading import digest_of, make_thumbnail
from cn_clip.search.roots import Entry, Root
from cn_clip.search.thumbnails import thumbnail_path, write_thumbnail
from cn_clip.text import path_text
from cn_clip.translation import _


@lru_cache(maxsize=16)
def _opened_root(kind: Literal["folder", "source"], location: bytes) -> Root:
    """Return a root whose source stays open."""
    return Root(kind, location)


def image_bytes(library: LibraryFolder, image: int) -> bytes:
    """Return the encoded bytes of an image, from the first file that still has its content.

    Raises:
        LibraryError: the library has no such image, or none of its files can be read.
    """
    reason = _("it has no file any more")
    for kind, location, name, position, digest in library.query(
        "SELECT roots.kind, roots.location, files.name, files.position, images.digest FROM files "
        "JOIN roots ON roots.id = files.root JOIN images ON images.id = files.image "
        "WHERE files.image = ? ORDER BY files.present DESC, files.id",
        (image,),
    ):
        for root in (_opened_root(kind, location), Root(kind, location)):
            try:
                content = root.read(Entry(name, 0, 0, position))
            except (CNClipError, OSError) as error:
                reason = str(error)
            else:
                if digest_of(content) == digest:
                    return content
                reason = _("its file has changed; run cn-clip index")
            if kind == "folder":
                break
            _opened_root.cache_clear()  # the source may be another since it was opened
    raise LibraryError(
        _(
            "image {image} of {library} cannot be read: {reason}",
            image=image,
            library=path_text(library.path),
            reason=reason,
        )
    )


def thumbnail_of(library: LibraryFolder, image: int) -> bytes | None:
    """Return the thumbnail of an image (WebP), made now if there is none; None if it cannot be."""
    rows = library.query("SELECT digest FROM images WHERE id = ?", (image,))
    if not rows:
        return None
    path = thumbnail_path(library.path, rows[0][0])
    with suppress(OSError):
        stored = path.read_bytes()
        if stored.startswith(b"RIFF"):
            return stored
    try:
        content = make_thumbnail(image_bytes(library, image))
    except CNClipError:
        return None
    with suppress(CNClipError):  # a read-only library
        write_thumbnail(library.path, rows[0][0], content)
    return content

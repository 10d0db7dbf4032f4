"""Results of a search as one HTML page, thumbnails included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cn_clip.html.page import write_page
from cn_clip.search.hit import Hit
from cn_clip.translation import _


class Searched(Protocol):
    """A library, or a folder of embedding shards."""

    def __len__(self) -> int: ...

    def thumbnail(self, image: int) -> bytes | None:
        """Return the thumbnail of an image."""
        ...


def write_sheet(library: Searched, query: str, hits: Sequence[Hit], path: Path) -> None:
    """Write the page."""
    write_page(
        path,
        "search/sheet.html",
        query or _("Similar images"),
        "search",
        hits=[(hit, library.thumbnail(hit.id), hit.uri) for hit in hits],
        matches=any(hit.matches for hit in hits),
        count=len(library),
    )

"""Results of a search as one HTML page, thumbnails included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cn_clip.html.page import write_page
from cn_clip.search.hit import Hit
from cn_clip.search.images import thumbnail_of
from cn_clip.search.library import Library
from cn_clip.translation import _


def write_sheet(library: Library, query: str, hits: Sequence[Hit], path: Path) -> None:
    """Write the page."""
    write_page(
        path,
        "search/sheet.html",
        query or _("Similar images"),
        "search",
        hits=[(hit, thumbnail_of(library.folder, hit.id), hit.uri) for hit in hits],
        matches=any(hit.matches for hit in hits),
        count=len(library),
    )

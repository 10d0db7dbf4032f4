"""``cn-clip search``: find images of a library by text or image."""

from __future__ import annotations

import inspect
import os
import re
import sys
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from cn_clip.cli.library_options import DEFAULT, LibraryLoading
from cn_clip.cli.show import Flag, console, print_json
from cn_clip.cli.usage import unknown_option
from cn_clip.errors import UsageError
from cn_clip.translation import _, translate

if TYPE_CHECKING:
    from cn_clip.search.hit import Hit
    from cn_clip.search.library import Library
    from cn_clip.shards.library import ShardLibrary

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

_OPTION = re.compile(r"(--[a-zA-Z][a-zA-Z-]*)(?:=.*)?|(-[a-zA-Z])", re.DOTALL)

# "-2:room.jpg" and "-17" are terms to avoid.
Terms = Annotated[
    tuple[str, ...], Parameter(negative=(), show_default=False, allow_leading_hyphen=True)
]


def search(
    *query: Annotated[str, Parameter(allow_leading_hyphen=True)],
    library: str = "default",
    image: Terms = (),
    like: Terms = (),
    top: int = 10,
    folder: str | None = None,
    after: str | None = None,
    before: str | None = None,
    min_side: int | None = None,
    min_size: str | None = None,
    max_size: str | None = None,
    caption: str | None = None,
    text: str | None = None,
    calibration: str | None = None,
    out: str | None = None,
    open: Flag = False,
    thumbnails: Flag = False,
    loading: LibraryLoading = DEFAULT,
    json: Flag = False,
) -> int:
    """Find images in a library by a description, an image, or both.

    Prints the best images with their probability and cosine, and "nothing here matches" if the
    best is below the threshold. Exit code 0 either way.

    Parameters
    ----------
    query
        A description such as 海边的日落; or terms with signs and weights: "2:猫" -室内
    library
        A name, or the path of a folder: a library, or embedding shards of `cn-clip bulk`.
    image
        An image to resemble; repeat for several. May be combined with a description.
    like
        Id of an image in the library to resemble, from an earlier search.
    top
        Number of results.
    folder
        Only images in this folder, or below.
    after
        Only images taken on this day or later: 2024, 2024-05 or 2024-05-01.
    before
        Only images taken on this day or earlier.
    min_side
        Only images whose shorter side has at least this many pixels.
    min_size
        Only files of at least this size: 500k, 2M.
    max_size
        Only files of at most this size.
    caption
        Only images with these words in the caption.
    text
        Only images with these words in the text recognised in them.
    calibration
        Calibration of the library's model: a .json file from `cn-clip eval calibrate`. Default:
        that of mini for mini; for others, confidence is estimated from the library itself.
    out
        Write the results as an HTML page with thumbnails.
    open
        Open this page in the browser.
    thumbnails
        Show the images below the table, in a terminal with the protocol of iTerm2: iTerm2, WezTerm,
        Konsole, mintty, VS Code.
    json
        Print JSON instead of a table.
    """
    from cn_clip import search as searching

    _refuse_options(query)
    page = _claimed_page(out, library, open=open)
    filters = searching.Filters(
        folder=folder,
        after=after,
        before=before,
        min_side=min_side,
        min_bytes=_bytes(min_size, "--min-size"),
        max_bytes=_bytes(max_size, "--max-size"),
        caption=caption,
        text=text,
    )
    words = " ".join(query)
    with _opened(library, loading, calibration) as opened:
        hits = opened.search(query, images=image, like=like, k=top, filters=filters)
        if page is not None:
            from cn_clip.search.sheet import write_sheet

            write_sheet(opened, words, hits, page)
        images = [(str(hit.id), opened.thumbnail(hit.id)) for hit in hits] if thumbnails else []
    if open and page is not None:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    if json:
        print_json(
            {
                "query": words,
                "library": os.fspath(opened.folder.path),
                "images": len(opened),
                "nothing_matches": not any(hit.matches for hit in hits),
                "hits": [hit.to_dict() for hit in hits],
            }
        )
        return 0
    _print(hits)
    if images:
        from cn_clip.cli.inline_images import print_images

        print_images(images)
    if out is not None:
        print(_("written: {out}", out=out))
    return 0


def _refuse_options(query: tuple[str, ...]) -> None:
    """Refuse options that do not exist, which are no terms to avoid, such as -k and --tpo.

    Raises:
        UsageError: there is one.
    """
    match = next((match for term in query if (match := _OPTION.fullmatch(term))), None)
    if match is None:
        return
    option = match[1] or match[2]
    known = [*inspect.signature(search).parameters, *LibraryLoading.__dataclass_fields__]
    names = [f"--{name.replace('_', '-')}" for name in known if name not in ("query", "loading")]
    raise UsageError(
        _(
            "{unknown_option}; run `cn-clip search --help`. To avoid a word, write -1:{word}",
            unknown_option=unknown_option(option, names),
            word=option.lstrip("-"),
        )
    )


def _opened(name: str, loading: LibraryLoading, calibration: str | None) -> Library | ShardLibrary:
    """Open a library, or a folder of embedding shards."""
    from cn_clip.search.places import is_shard_folder, library_path

    options = {
        "model": loading.model,
        "backend": loading.backend,
        "device": loading.device,
        "precision": loading.precision,
        "calibration": calibration,
    }
    path = library_path(name)
    if is_shard_folder(path):
        from cn_clip.shards.library import ShardLibrary

        return ShardLibrary(path, **options)  # type: ignore[arg-type]
    from cn_clip.search.library import Library

    return Library(name, **options)  # type: ignore[arg-type]


def _claimed_page(out: str | None, library: str, *, open: bool) -> Path | None:
    """Return the page to write: OUT, a temporary one to open, or none."""
    if out is None and not open:
        return None
    from cn_clip.html.page import claim_page  # 0.1 s, for pages alone

    if out is not None:
        from cn_clip.search.places import library_path

        return claim_page(out, "search", option="--out", inputs=[library_path(library)])
    handle, name = tempfile.mkstemp(".html", "cn-clip-search-")
    os.close(handle)
    return Path(name)


def _print(hits: list[Hit]) -> None:
    out = console()
    if not any(hit.matches for hit in hits):
        text = _("nothing here matches") if not hits else _("nothing here matches; the nearest are")
        out.print(text)
    if not hits:
        return
    table = Table(box=None, pad_edge=False, show_header=True)
    for name in (_("match"), _("cosine"), _("id")):
        table.add_column(name, justify="right")
    table.add_column(_("image"), overflow="fold")
    for hit in hits:
        probability = "" if hit.probability is None else f"{hit.probability:.0%}"
        reason = Text("")
        if hit.why != ("image",):
            reason = Text("  " + _(", ").join(map(translate, hit.why)), style="cyan")
        path = Text(hit.path, style=f"link {hit.uri}" if hit.uri and sys.stdout.isatty() else "")
        table.add_row(
            probability,
            f"{hit.cosine:.3f}",
            str(hit.id),
            path + reason,
            style="" if hit.matches else "dim",
        )
    out.print(table)


def _bytes(given: str | None, option: str) -> int | None:
    if given is None:
        return None
    match = _SIZE.fullmatch(given.strip())
    if match is None:
        raise UsageError(
            _("{option} is {given!r}; give bytes, 500k or 2M", option=option, given=given)
        )
    return int(Decimal(match[1]) * _UNITS[match[2].lower()])

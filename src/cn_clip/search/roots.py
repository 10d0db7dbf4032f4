"""What can be indexed: folders of images, and sources of image-text pairs."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cn_clip.data.sources.base import Source
from cn_clip.data.sources.open import absolute_uri, open_source, paths_of
from cn_clip.errors import DataError, UsageError
from cn_clip.files import as_path
from cn_clip.image.decode import SUFFIXES, read_file
from cn_clip.search.places import is_library
from cn_clip.search.scan import Scan, check_globs, scan_folder
from cn_clip.text import path_text
from cn_clip.translation import _

EMBEDDINGS = "embeddings:"  # location of images whose vectors were imported without their files
_NEW_SECONDS = 3  # a source that was changed this recently may change again in the same second


@dataclass(frozen=True, slots=True)
class Entry:
    """An image of a root.

    Attributes:
        name: relative path of a file, or the image id in a source.
        size: bytes; 0 in a source.
        mtime: nanoseconds; 0 in a source.
        position: first row of the image in a source.
        caption: the texts of the image in a source, one per line.
    """

    name: bytes
    size: int
    mtime: int
    position: int | None = None
    caption: str | None = None


@dataclass(slots=True)
class Root:
    """A folder or a source to index.

    Attributes:
        kind: of the root.
        location: absolute path, or URI with absolute paths.
        include, exclude: globs for the files of a folder.
        hidden: whether to include hidden files.
        id: in the database, set by ``index``.
        new_stamp: of a source that is read to its end, set by ``index``.
    """

    kind: Literal["folder", "source"]
    location: bytes
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    hidden: bool = False
    id: int = 0
    new_stamp: str | None = None
    _source: Source | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The path or URI, for messages."""
        return path_text(os.fsdecode(self.location))

    @property
    def source(self) -> Source:
        """The source, opened on first use.

        Raises:
            UsageError, DataError: as ``open_source``.
        """
        if self._source is None:
            self._source = open_source(os.fsdecode(self.location), required=("image",))
        return self._source

    def file(self, entry_name: bytes) -> Path:
        """Return the path of a file in a folder."""
        return Path(os.fsdecode(os.path.join(self.location, entry_name)))

    @property
    def is_readable(self) -> bool:
        """Whether the library knows where its images are."""
        return not self.location.startswith(EMBEDDINGS.encode())

    def read(self, entry: Entry) -> bytes:
        """Return the bytes of an image.

        Raises:
            ImageError, DataError: it cannot be read.
        """
        if self.kind == "folder":
            return read_file(self.file(entry.name))
        if not self.is_readable:
            raise DataError(_("only its vector was imported, from {name}", name=self.name))
        assert entry.position is not None
        if entry.position >= len(self.source):  # it was changed since it was indexed
            raise DataError(_("{name} has no row {row} now", name=self.name, row=entry.position))
        return self.source.image(entry.position)

    def path_of(self, entry: Entry) -> str:
        """Return where an image is, for messages."""
        return display_path(self.kind, self.location, entry.name)


@dataclass(frozen=True, slots=True)
class Listing:
    """The images of a root.

    Attributes:
        entries: None if the root is unchanged, or cannot be read.
        messages: about what cannot be read.
        skipped: images in formats that cannot be decoded, by suffix.
        may_hide: whether an image may exist that could not be listed.
        stamp: of a source.
    """

    entries: list[Entry] | None
    messages: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    may_hide: Callable[[bytes], bool] = lambda name: False
    stamp: str | None = None


def display_path(kind: str, location: bytes, name: bytes) -> str:
    """Return the absolute path of a file, or ``URI#ID`` of an image in a source."""
    if kind == "folder":
        return path_text(os.fsdecode(os.path.join(location, name)))
    return path_text(f"{os.fsdecode(location)}#{os.fsdecode(name)}")


def file_uri(location: bytes, name: bytes) -> str:
    """Return the ``file://`` URI of a file in a folder."""
    return Path(os.fsdecode(os.path.join(location, name))).as_uri()


def parse_root(
    given: str,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    hidden: bool = False,
) -> Root:
    """Return the root that a user names: a folder, or a source such as ``csv:products.csv``.

    Raises:
        UsageError: there is no such folder, or the URI is invalid.
    """
    check_globs([*include, *exclude])
    path = as_path(given)
    if path.is_dir():
        real = Path(os.path.realpath(path))
        if (library := next(filter(is_library, (real, *real.parents)), None)) is not None:
            raise UsageError(
                _(
                    "{folder} is in the library {library}; give a folder of images outside it",
                    folder=path_text(given),
                    library=path_text(library),
                )
            )
        if real == Path(real.anchor):
            raise UsageError(
                _("{folder} is the whole file system; name a folder in it", folder=given)
            )
        return Root("folder", os.fsencode(real), tuple(include), tuple(exclude), hidden)
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        raise UsageError(
            _(
                "{given} is an image; give its folder, with --include {name} for this file alone",
                given=path_text(given),
                name=path_text(path.name),
            )
        )
    if include or exclude or hidden:
        raise UsageError(
            _(
                "--include, --exclude and --hidden are for folders, and {given} is none",
                given=path_text(given),
            )
        )
    if ":" not in given and not any(c in given for c in "*?[{") and not path.exists():
        raise UsageError(_("no such folder: {given}", given=path_text(given)))
    return Root("source", os.fsencode(absolute_uri(given)))


def check_readable(root: Root) -> None:
    """Open a source; folders were checked by ``parse_root``.

    Raises:
        DataError: a file of it does not exist, or it cannot be read.
    """
    if root.kind == "source":
        for path in paths_of(os.fsdecode(root.location)):
            if not path.exists():
                raise DataError(_("no such file: {path}", path=path_text(path)))
        _opened = root.source


def list_root(root: Root, stamp: str | None, on_found: Callable[[int], None]) -> Listing:
    """List the images of a root.

    Args:
        root: what to list.
        stamp: of a source, when it was last read to its end; an unchanged one is not read again.
        on_found: called now and then with the number of images so far.
    """
    if root.kind == "folder":
        return _list_folder(root, on_found)
    if not root.is_readable:
        return Listing(None)
    return _list_source(root, stamp, on_found)


def _list_folder(root: Root, on_found: Callable[[int], None]) -> Listing:
    scan: Scan = scan_folder(
        Path(os.fsdecode(root.location)),
        include=root.include,
        exclude=root.exclude,
        hidden=root.hidden,
        on_found=on_found,
    )
    messages = [
        _(
            "the folder {folder} cannot be read ({reason}); its images are kept",
            folder=display_path("folder", root.location, name).rstrip("/"),
            reason=reason,
        )
        for name, reason in scan.unreadable
    ]
    if any(not name for name, _reason in scan.unreadable):
        return Listing(None, messages)
    entries = [Entry(file.name, file.size, file.mtime) for file in scan.files]
    return Listing(entries, messages, scan.skipped, scan.may_hide)


def _list_source(root: Root, stamp: str | None, on_found: Callable[[int], None]) -> Listing:
    try:
        new_stamp = _stamp_of(os.fsdecode(root.location))
        if stamp is not None and new_stamp == stamp:
            return Listing(None)
        source = root.source
    except (DataError, OSError) as error:
        return Listing(None, [_("{error}; its images are kept", error=error)])
    first: dict[str, int] = {}
    captions: dict[str, list[str]] = {}
    messages = []
    for position in range(len(source)):
        try:
            row = source.row(position)
        except DataError as error:
            messages.append(str(error))
            continue
        if not row.image_id:  # a text without an image
            continue
        first.setdefault(row.image_id, position)
        if row.text:
            captions.setdefault(row.image_id, []).append(row.text)
        if not position % 1000:
            on_found(len(first))
    entries = [
        Entry(os.fsencode(name), 0, 0, position, "\n".join(captions.get(name, [])) or None)
        for name, position in first.items()
    ]
    return Listing(entries, messages, may_hide=lambda name: bool(messages), stamp=new_stamp)


def _stamp_of(uri: str) -> str | None:
    """Return what changes when a source's own files change; None if it cannot be told.

    The images that a table names are files of their own: then every row is read again, and only
    its digest is compared.
    """
    parts = []
    for path in paths_of(uri):
        holds_images = path.suffix.lower() == ".tar" or path.name.endswith("_imgs.tsv")
        if path.is_dir() or not holds_images:
            return None
        status = path.stat()
        if time.time() - status.st_mtime < _NEW_SECONDS:
            return None
        parts.append(f"{path_text(path)}:{status.st_size}:{status.st_mtime_ns}")
    return "\n".join(parts) or None  # a remote source has no paths


def check_nesting(roots: Sequence[Root]) -> None:
    """Check that no folder is inside another: its images would be counted twice.

    Raises:
        UsageError: one is.
    """
    folders = {root.location for root in roots if root.kind == "folder"}
    for inner in sorted(folders):
        outer = next((above for above in _above(inner) if above in folders), None)
        if outer is not None:
            raise UsageError(
                _(
                    "{inner} is inside {outer}, which is indexed too; name one of them, or use "
                    "another library",
                    inner=path_text(os.fsdecode(inner)),
                    outer=path_text(os.fsdecode(outer)),
                )
            )


def _above(path: bytes) -> Iterator[bytes]:
    while (above := os.path.dirname(path)) != path:
        yield above
        path = above

"""The image files of an indexed folder."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cn_clip.errors import UsageError
from cn_clip.files import device_inode
from cn_clip.image.decode import SUFFIXES
from cn_clip.search.places import is_library
from cn_clip.text import path_text
from cn_clip.translation import _

# Folders of operating systems, cameras' servers and tools, which hold no photos of the user.
_SYSTEM_FOLDERS = frozenset((
    "$recycle.bin", "system volume information", "lost+found", "@eadir", "#recycle", "#snapshot",
    "@tmp", "__macosx", "__pycache__", "node_modules", "thumbs.db",
))  # fmt: skip
# Of images that Pillow or its plugins cannot decode, or only some installations can.
_OTHER_IMAGES = (
    ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".3fr", ".arw", ".cr2",
    ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file: its path relative to the root as bytes, its size, and when it was last changed in
    nanoseconds."""

    name: bytes
    size: int
    mtime: int


@dataclass(slots=True)
class Scan:
    """The image files of a folder.

    Attributes:
        files: those that can be decoded, by their suffixes.
        skipped: number of other images, by suffix.
        unreadable: (relative name, reason) of folders that cannot be read; a name of ``b""`` is
            the root itself.
    """

    files: list[FoundFile] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    unreadable: list[tuple[bytes, str]] = field(default_factory=list)

    def may_hide(self, name: bytes) -> bool:
        """Return whether a file may exist that the scan could not see."""
        return any(
            not folder or name.startswith(folder + b"/") for folder, _reason in self.unreadable
        )


def scan_folder(
    root: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    hidden: bool = False,
    suffixes: Sequence[str] = SUFFIXES,
    on_found: Callable[[int], None] = lambda count: None,
) -> Scan:
    """List the image files in a folder, recursively.

    Links to folders are followed, except to a folder that was seen. Libraries and folders of the
    system are skipped.

    Args:
        root: the folder.
        include: globs; a file must match one of them. A glob without ``/`` is matched with the
            name, another with the path below the root.
        exclude: globs of files and folders to skip.
        hidden: whether to include names that begin with a dot.
        suffixes: of image files, in lower case.
        on_found: called now and then with the number of files so far.
    """
    scan = Scan()
    wanted = _matcher(include) if include else None
    unwanted = _matcher(exclude) if exclude else None
    ends = tuple(suffixes)
    image_ends = (*ends, *_OTHER_IMAGES)
    seen = {device_inode(parent) for parent in Path(os.path.realpath(root)).parents}
    folders, linked = [(os.fspath(root), "")], list[tuple[str, str]]()
    while folders or linked:  # real folders before links to them
        folder, above = folders.pop() if folders else linked.pop(0)
        try:
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            where = os.fsencode(above.rstrip("/"))
            scan.unreadable.append((where, error.strerror or str(error)))
            continue
        inside: list[tuple[str, str]] = []
        for entry in entries:
            name = entry.name
            if name.startswith(".") and (not hidden or name.startswith("._")):
                continue
            relative = above + name
            if unwanted is not None and unwanted(relative):
                continue
            try:
                if entry.is_dir():
                    if name.lower() not in _SYSTEM_FOLDERS and not is_library(Path(entry.path)):
                        below = linked if entry.is_symlink() else inside
                        below.append((entry.path, relative + "/"))
                    continue
                if not name.lower().endswith(image_ends) or not entry.is_file():
                    continue
                if wanted is not None and not wanted(relative):
                    continue
                if not name.lower().endswith(ends):
                    scan.skipped[os.path.splitext(name)[1].lower()] += 1
                    continue
                status = entry.stat()
            except OSError:  # a link to itself, or a file deleted meanwhile
                continue
            scan.files.append(FoundFile(os.fsencode(relative), status.st_size, status.st_mtime_ns))
        folders += reversed(inside)
        on_found(len(scan.files))
    return scan


def check_globs(globs: Sequence[str]) -> None:
    """Check globs of a user.

    Raises:
        UsageError: one is empty, or an absolute path, which matches nothing.
    """
    for glob in globs:
        if not glob.strip() or os.path.isabs(glob):
            raise UsageError(
                _(
                    "the glob {glob!r} is empty or an absolute path; give a name such as *.jpg, "
                    "or a path below the folder such as 2024/*",
                    glob=path_text(glob),
                )
            )


def _matcher(globs: Sequence[str]) -> Callable[[str], bool]:
    """Return whether a relative path matches any glob; a folder's glob matches all below it."""
    names = [glob.strip("/") for glob in globs if "/" not in glob.strip("/")]
    paths = [glob.strip("/") for glob in globs if "/" in glob.strip("/")]
    match_name = _any_of(names)
    match_path = _any_of(paths)

    def matches(relative: str) -> bool:
        return match_name(relative.rpartition("/")[2]) or match_path(relative)

    return matches


def _any_of(globs: Sequence[str]) -> Callable[[str], bool]:
    if not globs:
        return lambda text: False
    pattern = re.compile("|".join(fnmatch.translate(glob) for glob in globs), re.IGNORECASE)
    return lambda text: pattern.match(text) is not None

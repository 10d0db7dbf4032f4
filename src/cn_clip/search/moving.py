"""Folders and sources that have moved: another disk, another drive letter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from cn_clip.errors import DataError, UsageError
from cn_clip.search.folder import LibraryFolder
from cn_clip.search.roots import Root, check_nesting, parse_root
from cn_clip.text import path_text
from cn_clip.translation import _

_SAMPLE = 1000  # files that are looked for in the new place


@dataclass(frozen=True, slots=True)
class Move:
    """A root that was moved.

    Attributes:
        old, new: its locations.
        checked, found: files that were looked for in the new place, and that are there.
    """

    old: str
    new: str
    checked: int
    found: int


def move_root(library: LibraryFolder, old: str, new: str) -> list[Move]:
    """Note that a folder or source has moved; the folder itself is not touched.

    All roots inside ``old`` move with it, as when a disk is mounted elsewhere.

    Args:
        library: opened for writing, locked by ``LibraryFolder.writing``.
        old: location in the library; it need not exist any more.
        new: where its files are now.

    Raises:
        UsageError: nothing was indexed from ``old``; the new place does not exist, has none of the
            files, or overlaps with another root.
        DataError: the new source cannot be opened.
    """
    roots = {
        int(number): Root(kind, bytes(location))
        for number, kind, location in library.query("SELECT id, kind, location FROM roots")
    }
    moved = _new_locations(roots, old, new)
    if not moved:
        raise UsageError(
            _(
                "nothing was indexed from {old}; what was: {roots}",
                old=path_text(old),
                roots=", ".join(root.name for root in roots.values()),
            )
        )
    moves = [_check(library, number, roots[number], root) for number, root in moved.items()]
    locations = [(roots | moved)[number].location for number in roots]
    check_nesting([*(roots | moved).values()])
    if len({*locations}) < len(locations):
        raise UsageError(_("{new} was indexed too; remove one of them first", new=path_text(new)))
    with library.database.transaction() as connection:
        # First to names that nothing has: two disks may have swapped places.
        for number in moved:
            connection.execute(
                "UPDATE roots SET location = ? WHERE id = ?", (f"moving {number}".encode(), number)
            )
        for number, root in moved.items():
            connection.execute(
                "UPDATE roots SET location = ? WHERE id = ?", (root.location, number)
            )
    return moves


def _new_locations(roots: dict[int, Root], old: str, new: str) -> dict[int, Root]:
    """Return the roots at or inside ``old`` with their new locations.

    Raises:
        UsageError, DataError: as ``parse_root``.
    """
    names = {os.fsencode(old.rstrip(os.sep) or old), os.fsencode(os.path.abspath(old))}
    names.add(os.fsencode(os.path.realpath(os.path.expanduser(old))))
    moved = {}
    for number, root in roots.items():
        scheme, rest = (b"", root.location)
        if root.kind == "source":
            head, colon, path = root.location.partition(b":")
            scheme, rest = head + colon, path
        if root.location in names:
            moved[number] = parse_root(new)
            continue
        above = next((name for name in names if rest.startswith(name + os.fsencode(os.sep))), None)
        if above is not None:
            place = os.fsencode(os.path.abspath(os.path.expanduser(new))).rstrip(b"/")
            moved[number] = parse_root(os.fsdecode(scheme + place + rest[len(above) :]))
    return moved


def _check(library: LibraryFolder, number: int, old: Root, new: Root) -> Move:
    """Look for some of the files in the new place."""
    if new.kind != old.kind:
        raise UsageError(
            _(
                "{old} and {new} are not of one kind; give two folders, or two sources",
                old=old.name,
                new=new.name,
            )
        )
    names = [
        bytes(name)
        for (name,) in library.query(
            "SELECT name FROM files WHERE root = ? AND present ORDER BY RANDOM() LIMIT ?",
            (number, _SAMPLE),
        )
    ]
    found = _found(new, names)
    if names and not found:
        raise UsageError(
            _(
                "{new} has none of {count:,} files of {old}, such as {name}; give the folder that "
                "holds them",
                new=new.name,
                count=len(names),
                old=old.name,
                name=path_text(os.fsdecode(names[0])),
            )
        )
    return Move(old.name, new.name, len(names), found)


def _found(root: Root, names: Sequence[bytes]) -> int:
    if root.kind == "folder":
        return sum(os.path.exists(os.path.join(root.location, name)) for name in names)
    source, known = root.source, set()
    for position in range(len(source)):
        try:
            known.add(os.fsencode(source.row(position).image_id))
        except DataError:
            continue
    return sum(name in known for name in names)

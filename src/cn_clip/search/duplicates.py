"""Groups of images in a library that look alike: resized, recompressed, the same scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cn_clip.data.curate.grouping import connected, group_rows
from cn_clip.data.curate.perceptual_hash import HASH_WORDS, near_pairs
from cn_clip.search.folder import LibraryFolder
from cn_clip.search.roots import display_path


@dataclass(frozen=True, slots=True)
class Duplicate:
    """An image of a group.

    Attributes:
        id: of the image.
        paths: of its files; several if they are equal.
        width, height: in pixels.
        bytes: size of the file.
    """

    id: int
    paths: list[str]
    width: int
    height: int
    bytes: int


def duplicates(library: LibraryFolder) -> list[list[Duplicate]]:
    """Return groups of images that look alike, and of equal files, largest image first.

    Two images are in one group if a chain of near-duplicates joins them (``cn-clip data check``
    uses the same hash). Images without a file are left out. Memory: 300 bytes an image.
    """
    rows = library.query(
        "SELECT id, look, files FROM images WHERE files > 0 AND look IS NOT NULL ORDER BY id"
    )
    ids = np.array([row[0] for row in rows], np.int64)
    files = np.array([row[2] for row in rows], np.int64)
    hashes = np.frombuffer(b"".join(row[1] for row in rows), np.uint64).reshape(-1, HASH_WORDS)
    if not len(ids):
        return []
    first = connected(len(ids), np.stack(near_pairs(hashes)))
    groups = group_rows(np.arange(len(ids)), first.view(np.uint64))
    several = (np.diff(groups.starts) > 1) | (files[groups.firsts] > 1)
    found = [
        [_duplicate(library, int(ids[number])) for number in groups[int(group)]]
        for group in np.flatnonzero(several)
    ]
    return [sorted(group, key=lambda each: -each.width * each.height) for group in found]


def _duplicate(library: LibraryFolder, image: int) -> Duplicate:
    facts = library.query("SELECT width, height, bytes FROM images WHERE id = ?", (image,))[0]
    files = library.query(
        "SELECT roots.kind, roots.location, files.name FROM files JOIN roots "
        "ON roots.id = files.root WHERE files.image = ? AND files.present ORDER BY files.id",
        (image,),
    )
    return Duplicate(image, [display_path(*row) for row in files], *facts)

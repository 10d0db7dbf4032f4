"""Groups of images in a library that look alike: resized, recompressed, the same scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
    looks = b"".join(row[1] for row in rows)
    hashes = np.frombuffer(looks, np.uint64).reshape(-1, HASH_WORDS)
    groups = _joined(*near_pairs(hashes)) if len(ids) > 1 else {}
    for number, (_id, _look, files) in enumerate(rows):
        if files > 1:
            groups.setdefault(number, {number})
    distinct = {min(members): members for members in groups.values()}
    found = [
        [_duplicate(library, int(ids[number])) for number in sorted(distinct[first])]
        for first in sorted(distinct)
    ]
    return [sorted(group, key=lambda each: -each.width * each.height) for group in found]


def _joined(later: npt.NDArray[np.int64], earlier: npt.NDArray[np.int64]) -> dict[int, set[int]]:
    """Return the group of each number that is in a pair."""
    groups: dict[int, set[int]] = {}
    for a, b in zip(later.tolist(), earlier.tolist(), strict=True):
        small, large = sorted((groups.get(a, {a}), groups.get(b, {b})), key=len)
        if small is not large:
            large |= small
            groups |= dict.fromkeys((a, b, *small), large)
    return groups


def _duplicate(library: LibraryFolder, image: int) -> Duplicate:
    facts = library.query("SELECT width, height, bytes FROM images WHERE id = ?", (image,))[0]
    files = library.query(
        "SELECT roots.kind, roots.location, files.name FROM files JOIN roots "
        "ON roots.id = files.root WHERE files.image = ? AND files.present ORDER BY files.id",
        (image,),
    )
    return Duplicate(image, [display_path(*row) for row in files], *facts)

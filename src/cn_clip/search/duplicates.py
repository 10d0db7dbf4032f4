"""Groups of images in a library that look alike: resized, recompressed, the same scene."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from cn_clip.data.curate.grouping import connected, group_rows
from cn_clip.data.curate.perceptual_hash import HASH_WORDS, hash_image, near_pairs, read_for_hash
from cn_clip.errors import CNClipError
from cn_clip.search.folder import LibraryFolder
from cn_clip.search.images import image_bytes
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


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What was found.

    Attributes:
        groups: of images that look alike, and of equal files, largest image first.
        not_compared: number of images whose files are not at hand and were not read before, as
            only their embeddings were imported.
    """

    groups: list[list[Duplicate]]
    not_compared: int


def duplicates(
    library: LibraryFolder,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Duplicates:
    """Find groups of images that look alike.

    Two images are in one group if a chain of near-duplicates joins them (``cn-clip data check``
    uses the same hash). Images without a file are left out; those whose embeddings were imported
    are read now. Memory: 300 bytes an image.

    Args:
        library: only read.
        on_progress: called with the number of images read so far and in total.
    """
    rows = library.query("SELECT id, look, files FROM images WHERE files > 0 ORDER BY id")
    unknown = [image for image, look, _files in rows if look is None]
    looks: dict[int, bytes | None] = {}
    for done, image in enumerate(unknown, 1):
        looks[image] = _look_of(library, image)
        on_progress(done, len(unknown))
    compared: list[tuple[int, bytes, int]] = [
        (image, found, files)
        for image, look, files in rows
        if (found := look or looks[image]) is not None
    ]
    if not compared:
        return Duplicates([], len(rows))
    hashes = np.frombuffer(b"".join(look for _id, look, _files in compared), np.uint64)
    links = np.stack(near_pairs(hashes.reshape(-1, HASH_WORDS)))
    first = connected(len(compared), links)
    groups = group_rows(np.arange(len(compared)), first.view(np.uint64))
    files = np.array([files for _id, _look, files in compared])
    several = (np.diff(groups.starts) > 1) | (files[groups.firsts] > 1)
    groups_found = [
        [_duplicate(library, compared[number][0]) for number in groups[int(group)]]
        for group in np.flatnonzero(several)
    ]
    by_size = [sorted(group, key=lambda each: -each.width * each.height) for group in groups_found]
    return Duplicates(by_size, len(rows) - len(compared))


def _look_of(library: LibraryFolder, image: int) -> bytes | None:
    """Return the perceptual hash of an image; None if it cannot be read."""
    with suppress(CNClipError):
        content = image_bytes(library, image)
        return hash_image(read_for_hash(content)).tobytes()
    return None


def _duplicate(library: LibraryFolder, image: int) -> Duplicate:
    facts = library.query("SELECT width, height, bytes FROM images WHERE id = ?", (image,))[0]
    files = library.query(
        "SELECT roots.kind, roots.location, files.name FROM files JOIN roots "
        "ON roots.id = files.root WHERE files.image = ? AND files.present ORDER BY files.id",
        (image,),
    )
    return Duplicate(image, [display_path(*row) for row in files], *facts)

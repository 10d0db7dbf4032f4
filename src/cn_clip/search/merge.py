"""Another library of the same model taken into a library, without embedding anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from cn_clip.errors import LibraryError, UsageError
from cn_clip.search.folder import LibraryFolder, StoredModel
from cn_clip.search.fulltext import tokens
from cn_clip.search.library_model import MIN_COSINE
from cn_clip.search.thumbnails import thumbnail_path, write_thumbnail
from cn_clip.text import path_text
from cn_clip.translation import _

_TOGETHER = 4096  # images committed together
_COMPARED = 64  # images of both libraries whose vectors are compared
_IMAGE = "digest, bytes, width, height, taken, latitude, longitude, look, text"
_FILE = "position, size, mtime, error, caption, present"


@dataclass(slots=True)
class Merge:
    """What was taken over: images that were new, and files."""

    images: int = 0
    files: int = 0


def merge(
    library: LibraryFolder,
    other: LibraryFolder,
    *,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Merge:
    """Take the images of another library into one. After an interruption, merge again.

    An image that both have keeps its id and vector. A folder that both have keeps the files that
    are known here; a folder inside one of this library's becomes a part of that.

    Args:
        library: opened for writing, locked by ``LibraryFolder.writing``.
        other: only read.
        on_progress: called with the number of images so far and in total.

    Raises:
        UsageError: it is the same library, or one of its folders contains one of this library's.
        LibraryError: the libraries are of different models.
        CNClipError: the disk is full; what was committed stays.
    """
    if other.path == library.path:
        raise UsageError(
            _("{library} cannot be merged with itself", library=path_text(library.path))
        )
    theirs, ours = other.active_model(), library.active_model()
    if theirs is None:
        return Merge()
    _check_models(library, ours, other, theirs)
    places = _places(library, other)
    if ours is None:
        ours = _copy_model(library, theirs)
    done = Merge()
    with other.reading():
        vectors = other.vector_file(theirs).open(theirs.rows)
        rows = other.query(
            f"SELECT id, {_IMAGE} FROM images WHERE id IN (SELECT image FROM files) ORDER BY id"
        )
        without = {
            image
            for (image,) in other.query("SELECT image FROM missing WHERE model = ?", (theirs.id,))
        }
        for start in range(0, len(rows), _TOGETHER):
            batch = rows[start : start + _TOGETHER]
            ids = _take_images(library, ours, batch, vectors, without, done)
            _take_files(library, other, places, ids, done)
            for _id, digest, *_facts in batch:
                with suppress(FileNotFoundError):
                    content = thumbnail_path(other.path, digest).read_bytes()
                    write_thumbnail(library.path, digest, content)
            on_progress(start + len(batch), len(rows))
        _take_files(library, other, places, {None: None}, done)
    return done


def _check_models(
    library: LibraryFolder, ours: StoredModel | None, other: LibraryFolder, theirs: StoredModel
) -> None:
    """Check that vectors of both libraries may be compared with each other."""
    if ours is None or ours.fingerprint == theirs.fingerprint:
        return
    same = {ours.fingerprint, ours.derived_from} & (
        {theirs.fingerprint, theirs.derived_from} - {None}
    )
    if same and _lowest_cosine(library, ours, other, theirs) >= MIN_COSINE:
        return
    raise LibraryError(
        _(
            "{other} was made with the model {theirs} ({their_fingerprint:.8}), and {library} with "
            "{ours} ({our_fingerprint:.8}); embed one of them with the other's model first: "
            "cn-clip index --model {ours}",
            other=path_text(other.path),
            theirs=theirs.name,
            their_fingerprint=theirs.fingerprint,
            library=path_text(library.path),
            ours=ours.name,
            our_fingerprint=ours.fingerprint,
        )
    )


def _lowest_cosine(
    library: LibraryFolder, ours: StoredModel, other: LibraryFolder, theirs: StoredModel
) -> float:
    """Compare the vectors of images that both libraries have; 1 if there is none."""
    lowest, compared = 1.0, 0
    our_rows = library.vector_file(ours).open(ours.rows)
    their_rows = other.vector_file(theirs).open(theirs.rows)
    for image, digest in other.query("SELECT id, digest FROM images"):
        same = library.query("SELECT id FROM images WHERE digest = ?", (digest,))
        if not same:
            continue
        one = our_rows[same[0][0] - 1].astype(np.float32)
        two = their_rows[image - 1].astype(np.float32)
        if one.any() and two.any():
            lowest, compared = min(lowest, float(one @ two)), compared + 1
        if compared == _COMPARED:
            break
    return lowest


def _places(library: LibraryFolder, other: LibraryFolder) -> dict[int, tuple[int, bytes]]:
    """Return for each root of the other library the root here that takes its files, and the prefix
    of their names. New roots are created."""
    ours = {
        location: (root, kind)
        for root, kind, location in library.query("SELECT id, kind, location FROM roots")
    }
    places: dict[int, tuple[int, bytes]] = {}
    new: list[tuple[Any, ...]] = []
    for root, *values in other.query(
        "SELECT id, kind, location, include, exclude, hidden, stamp FROM roots"
    ):
        kind, location = values[:2]
        if location in ours:
            places[root] = (ours[location][0], b"")
            continue
        separator = os.fsencode(os.sep)
        folders = [each for each, (_id, own) in ours.items() if own == kind == "folder"]
        outer = next((each for each in folders if location.startswith(each + separator)), None)
        if outer is not None:
            name = location[len(outer) + 1 :].replace(separator, b"/")
            places[root] = (ours[outer][0], name + b"/")
            continue
        inner = next((each for each in folders if each.startswith(location + separator)), None)
        if inner is not None:
            raise UsageError(
                _(
                    "{inner} of {library} is inside {outer} of {other}; merge the other way round",
                    inner=path_text(os.fsdecode(inner)),
                    library=path_text(library.path),
                    outer=path_text(os.fsdecode(location)),
                    other=path_text(other.path),
                )
            )
        new.append((root, *values))
    with library.database.transaction() as connection:
        for root, *values in new:
            cursor = connection.execute(
                "INSERT INTO roots (kind, location, include, exclude, hidden, stamp) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                values,
            )
            assert cursor.lastrowid is not None
            places[root] = (cursor.lastrowid, b"")
    return places


def _copy_model(library: LibraryFolder, model: StoredModel) -> StoredModel:
    """Give an empty library the model of another."""
    names = [name for name in StoredModel.__slots__ if name not in ("id", "rows")]
    with library.database.transaction() as connection:
        connection.execute(
            f"INSERT INTO models ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
            [getattr(model, name) for name in names],
        )
    active = library.active_model()
    assert active is not None
    return active


def _take_images(
    library: LibraryFolder,
    model: StoredModel,
    batch: list[Any],
    vectors: np.ndarray[Any, np.dtype[np.float16]],
    without: set[int],
    done: Merge,
) -> dict[int | None, int | None]:
    """Add the images of a batch that are new: the vectors first, then the facts.

    Returns:
        The id here of each image.
    """
    ids: dict[int | None, int | None] = {}
    new = []
    for image, digest, *_facts in batch:
        known = library.query("SELECT id FROM images WHERE digest = ?", (digest,))
        if known:
            ids[image] = known[0][0]
        else:
            new.append(image)
    (rows,) = library.query("SELECT rows FROM models WHERE id = ?", (model.id,))[0]
    if new:
        library.vector_file(model).write(rows, vectors[np.array(new, np.int64) - 1])
        ids |= zip(new, range(rows + 1, rows + 1 + len(new)), strict=True)
    facts = {image: values for image, *values in batch}
    marks = ", ".join("?" * (1 + len(_IMAGE.split(","))))
    with library.database.transaction() as connection:
        for image in new:
            connection.execute(
                f"INSERT INTO images (id, {_IMAGE}) VALUES ({marks})", (ids[image], *facts[image])
            )
            if text := facts[image][-1]:
                connection.execute(
                    "INSERT INTO image_words (rowid, words) VALUES (?, ?)",
                    (ids[image], tokens(text)),
                )
            if image in without:
                connection.execute("INSERT INTO missing VALUES (?, ?)", (model.id, ids[image]))
        connection.execute("UPDATE models SET rows = ? WHERE id = ?", (rows + len(new), model.id))
    done.images += len(new)
    return ids


def _take_files(
    library: LibraryFolder,
    other: LibraryFolder,
    places: dict[int, tuple[int, bytes]],
    ids: dict[int | None, int | None],
    done: Merge,
) -> None:
    """Add the files of images (of no image for ``None``), unless they are known."""
    with library.database.transaction() as connection:
        for image, own in ids.items():
            for root, name, *values in other.query(
                f"SELECT root, name, {_FILE} FROM files WHERE image IS ?", (image,)
            ):
                place, prefix = places[root]
                cursor = connection.execute(
                    f"INSERT OR IGNORE INTO files (root, name, image, {_FILE}) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (place, prefix + name, own, *values),
                )
                if not cursor.rowcount:
                    continue
                done.files += 1
                caption = values[4]
                if caption:
                    connection.execute(
                        "INSERT INTO caption_words (rowid, words) VALUES (?, ?)",
                        (cursor.lastrowid, tokens(caption)),
                    )

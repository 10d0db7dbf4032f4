"""Images removed from a library for good: vector, thumbnail, text and facts.

Removal has three steps, each of which can be repeated: the facts are deleted in one transaction,
which notes the images in the table ``erasures``; their vectors and thumbnails are overwritten and
deleted; the database is rewritten without the space that the facts took. After an interruption, the
next command that writes to the library does the rest.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from cn_clip.errors import UsageError
from cn_clip.files import as_path
from cn_clip.publish import map_write_errors
from cn_clip.search import database
from cn_clip.search.folder import CACHE, LibraryFolder
from cn_clip.search.migration import remove_unused_vectors
from cn_clip.search.roots import display_path
from cn_clip.search.thumbnails import remove_thumbnail, sweep_thumbnails
from cn_clip.text import path_text
from cn_clip.translation import _

# Files to remove, in a temporary table of the connection.
_CHOSEN = "CREATE TEMP TABLE IF NOT EXISTS chosen (file INTEGER PRIMARY KEY, image INTEGER)"


@dataclass(frozen=True, slots=True)
class Removal:
    """What was removed.

    Attributes:
        files: rows of files.
        images: images, with their vectors.
        on_disk: paths of files that still exist: the next ``cn-clip index`` adds them again.
        is_erased: whether no trace is left; False while another process reads an old state.
    """

    files: int
    images: int
    on_disk: list[str]
    is_erased: bool


def remove_paths(library: LibraryFolder, paths: Sequence[str]) -> Removal:
    """Remove what was indexed from folders, sources or files; images with a file elsewhere stay.

    Args:
        library: opened for writing, locked by ``LibraryFolder.writing``.
        paths: of roots, or of folders and files in them.

    Raises:
        UsageError: nothing was indexed from a path; nothing is removed.
        CNClipError: the disk is full or read-only.
    """
    with library.database.transaction() as connection:
        _begin(connection)
        whole = [root for path in paths if (root := _choose_path(connection, path)) is not None]
        on_disk = _on_disk(connection) if not whole else []
        counts = _remove_chosen(connection)
        connection.executemany("DELETE FROM roots WHERE id = ?", [(root,) for root in whole])
    return Removal(*counts, on_disk, finish_erasures(library))


def remove_images(library: LibraryFolder, images: Sequence[int]) -> Removal:
    """Remove images by their ids, with all their files.

    Raises:
        UsageError: the library has no such image; nothing is removed.
        CNClipError: the disk is full or read-only.
    """
    with library.database.transaction() as connection:
        _begin(connection)
        for image in images:
            if not connection.execute("SELECT 1 FROM images WHERE id = ?", (image,)).fetchone():
                raise UsageError(
                    _("the library has no image {image}; see the ids of a search", image=image)
                )
            connection.execute(
                "INSERT OR IGNORE INTO chosen SELECT id, image FROM files WHERE image = ?", (image,)
            )
        on_disk = _on_disk(connection)
        counts = _remove_chosen(connection, images)
    return Removal(*counts, on_disk, finish_erasures(library))


def remove_absent(library: LibraryFolder) -> Removal:
    """Remove the files that are gone since they were indexed, and images without a file."""
    with library.database.transaction() as connection:
        _begin(connection)
        connection.execute("INSERT INTO chosen SELECT id, image FROM files WHERE NOT present")
        without_files = connection.execute(
            "SELECT id FROM images WHERE files = 0 AND NOT EXISTS "
            "(SELECT 1 FROM files WHERE files.image = images.id)"
        ).fetchall()
        counts = _remove_chosen(connection, [image for (image,) in without_files])
    return Removal(*counts, [], finish_erasures(library))


def finish_erasures(library: LibraryFolder) -> bool:
    """Erase what is left of removed images; return whether nothing is left.

    Raises:
        CNClipError: the disk is full or read-only; the next call goes on.
    """
    sweep_thumbnails(library.path)
    rows = library.query("SELECT image, digest FROM erasures WHERE pending = 2 ORDER BY image")
    if rows:
        images = np.array([image for image, _digest in rows], np.int64)
        for model in library.models():
            library.vector_file(model).erase(images - 1)
        remove_unused_vectors(library)
        for _image, digest in rows:
            remove_thumbnail(library.path, digest)
        with map_write_errors(path_text(library.path)), suppress(FileNotFoundError):
            shutil.rmtree(library.path / CACHE)  # codes of vectors
        with library.database.transaction() as connection:
            connection.execute("UPDATE erasures SET pending = 1, digest = NULL WHERE pending = 2")
    if not library.query("SELECT 1 FROM erasures WHERE pending = 1 LIMIT 1"):
        return True
    if not rewrite(library):
        return False
    with library.database.transaction() as connection:
        connection.execute("UPDATE erasures SET pending = 0 WHERE pending = 1")
    return True


def rewrite(library: LibraryFolder) -> bool:
    """Rewrite the database without unused space; return False if a reader keeps the old state.

    Raises:
        LibraryError: another process uses the database.
        CNClipError: the disk is full.
    """
    connection = library.database.connection
    with database.map_errors(library.path):
        for words in ("caption_words", "image_words"):
            # Deleted words stay in older segments of the index until all are merged.
            connection.execute(f"INSERT INTO {words} ({words}) VALUES ('optimize')")
        connection.execute("VACUUM")
        (busy, *_unused) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not busy


def _begin(connection: sqlite3.Connection) -> None:
    connection.execute(_CHOSEN)
    connection.execute("DELETE FROM chosen")


def _choose_path(connection: sqlite3.Connection, given: str) -> int | None:
    """Choose the files of a root, or of a folder in a root; return the id of a root."""
    roots = connection.execute("SELECT id, kind, location FROM roots").fetchall()
    raw = os.fsencode(given)
    path = os.fsencode(os.path.realpath(as_path(given)))
    for root, kind, location in roots:
        if location == raw or (kind == "folder" and location == path):
            connection.execute(
                "INSERT OR IGNORE INTO chosen SELECT id, image FROM files WHERE root = ?", (root,)
            )
            return int(root)
    for root, kind, location in roots:
        if kind != "folder" or not path.startswith(location + os.fsencode(os.sep)):
            continue
        name = path[len(location) + 1 :].replace(os.fsencode(os.sep), b"/")
        # "0" follows "/": the names below a folder are a range.
        chosen = connection.execute(
            "INSERT OR IGNORE INTO chosen SELECT id, image FROM files WHERE root = ? AND "
            "(name = ? OR (name >= ? AND name < ?))",
            (root, name, name + b"/", name + b"0"),
        )
        if chosen.rowcount:
            return None
    raise UsageError(
        _(
            "nothing was indexed from {path}; what was: {roots}",
            path=path_text(given),
            roots=", ".join(path_text(os.fsdecode(location)) for *_unused, location in roots),
        )
    )


def _on_disk(connection: sqlite3.Connection) -> list[str]:
    """Return the paths of chosen files that exist."""
    paths = [
        display_path(kind, location, name)
        for kind, location, name in connection.execute(
            "SELECT roots.kind, roots.location, files.name FROM chosen "
            "JOIN files ON files.id = chosen.file JOIN roots ON roots.id = files.root "
            "WHERE files.present AND roots.kind = 'folder'"
        )
        if os.path.lexists(os.path.join(location, name))
    ]
    return paths


def _remove_chosen(connection: sqlite3.Connection, images: Sequence[int] = ()) -> tuple[int, int]:
    """Remove the chosen files, and the images that have no file then; return their numbers."""
    candidates = {image for (image,) in connection.execute("SELECT image FROM chosen") if image}
    (files,) = connection.execute("SELECT COUNT(*) FROM chosen").fetchone()
    connection.execute(
        "DELETE FROM caption_words WHERE rowid IN (SELECT file FROM chosen JOIN files "
        "ON files.id = chosen.file WHERE files.caption IS NOT NULL)"
    )
    connection.execute("DELETE FROM files WHERE id IN (SELECT file FROM chosen)")
    connection.execute("DELETE FROM chosen")
    gone = [
        image
        for image in sorted({*candidates, *images})
        if not connection.execute("SELECT 1 FROM files WHERE image = ?", (image,)).fetchone()
    ]
    models = [model for (model,) in connection.execute("SELECT id FROM models")]
    for image in gone:
        connection.execute(
            "INSERT OR IGNORE INTO erasures (image, digest) SELECT id, digest FROM images "
            "WHERE id = ?",
            (image,),
        )
        connection.execute("DELETE FROM image_words WHERE rowid = ?", (image,))
        for model in models:
            connection.execute("DELETE FROM missing WHERE model = ? AND image = ?", (model, image))
        connection.execute("DELETE FROM images WHERE id = ?", (image,))
    return files, len(gone)

"""A damaged library put right as far as it can be, so that ``cn-clip index`` completes it."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from cn_clip.publish import map_write_errors
from cn_clip.search import database
from cn_clip.search.folder import LibraryFolder, StoredModel
from cn_clip.search.migration import remove_unused_vectors
from cn_clip.search.purge import finish_erasures
from cn_clip.search.thumbnails import stored_thumbnails
from cn_clip.search.verify import (
    check_database,
    database_damage,
    miscounted_images,
    wrong_rows,
)
from cn_clip.search.words import rebuild_words
from cn_clip.text import path_text


@dataclass(slots=True)
class Repair:
    """What was put right.

    Attributes:
        lost_vectors: images without a vector now; ``cn-clip index`` embeds those of the active
            model again.
        recounted: images whose number of files was wrong.
        thumbnails: orphans deleted.
        indexes: whether the indexes of the database were rebuilt.
    """

    lost_vectors: int = 0
    recounted: int = 0
    thumbnails: int = 0
    indexes: bool = False


def repair(library: LibraryFolder) -> Repair:
    """Repair a library. Harmless on an intact one.

    Args:
        library: opened for writing, locked by ``LibraryFolder.writing``.

    Raises:
        LibraryError: the database is damaged beyond repair; nothing was changed.
        CNClipError: the disk is full or read-only.
    """
    done = Repair()
    if damage := database_damage(library):
        with suppress(sqlite3.Error):
            library.database.connection.execute("REINDEX")
            damage = database_damage(library)
            if damage and all("is never used" in text for text in damage):
                library.database.connection.execute("VACUUM")
        check_database(library)
        done.indexes = True
    rebuild_words(library)
    done.recounted = miscounted_images(library)
    if done.recounted:
        with library.database.transaction() as connection:
            connection.execute(
                "UPDATE images SET files = (SELECT COUNT(*) FROM files "
                "WHERE files.image = images.id AND files.present)"
            )
    finish_erasures(library)
    remove_unused_vectors(library)
    for model in library.models():
        done.lost_vectors += _repair_vectors(library, model)
    known = {bytes(digest) for (digest,) in library.query("SELECT digest FROM images")}
    for path, digest in stored_thumbnails(library.path):
        if digest not in known:
            with map_write_errors(path_text(path)):
                path.unlink(missing_ok=True)
            done.thumbnails += 1
    return done


def _repair_vectors(library: LibraryFolder, model: StoredModel) -> int:
    """Note the images whose vectors are lost or wrong as missing; return their number."""
    file = library.vector_file(model)
    (last,) = library.query("SELECT COALESCE(MAX(id), 0) FROM images")[0]
    rows = max(model.rows, last) if model.state == "active" else model.rows
    stored = min(file.rows_stored(), model.rows)
    vectors = file.open(stored)
    zero, invalid = wrong_rows(library, model, vectors)
    del vectors  # unmapped before the file is changed
    lost = np.concatenate([zero, invalid, np.arange(stored, rows)])
    # First the note: after a kill in between, the rows are hidden.
    with library.database.transaction() as connection:
        before = connection.total_changes
        connection.executemany(
            "INSERT OR IGNORE INTO missing SELECT ?, ? WHERE NOT EXISTS "
            "(SELECT 1 FROM erasures WHERE image = ?)",
            ((model.id, row + 1, row + 1) for row in lost.tolist()),
        )
        added = connection.total_changes - before
        connection.execute("UPDATE models SET rows = ? WHERE id = ?", (rows, model.id))
    with database.map_errors(library.path):
        file.extend(rows)
        file.erase(np.sort(invalid))
    return added

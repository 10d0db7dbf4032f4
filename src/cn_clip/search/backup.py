"""A copy of a library at one moment, made while it is searched and written."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Collection
from contextlib import closing, suppress
from pathlib import Path

from cn_clip.errors import LibraryError
from cn_clip.outputs import OutputCheck, atomic_folder, claim, entries, own_folder, stamped_files
from cn_clip.search import database
from cn_clip.search.database import DATABASE
from cn_clip.search.folder import CACHE, LibraryFolder
from cn_clip.search.places import ABOUT
from cn_clip.search.thumbnails import thumbnail_path
from cn_clip.search.verify import wrong_rows

_COMMAND = "library backup"
_ATTEMPTS = 3
# Files that a reader of the backup creates.
_OF_READERS = (f"{DATABASE}-wal", f"{DATABASE}-shm")


def claim_backup(library: Path, out: str, *, overwrite: bool = False) -> Path:
    """Check that a backup may be written, without touching anything. Return its path.

    Raises:
        UsageError: as ``outputs.claim``; a backup that was indexed since counts as another's.
    """
    return claim(out, _own(), kind="folder", inputs=[library], overwrite=overwrite)


def back_up(library: LibraryFolder, out: Path, *, thumbnails: bool = True) -> int:
    """Write a copy of a library, which is a library itself; return its number of images.

    Its database is a snapshot, and vectors that a snapshot counts change only when images are
    removed: these have no vector in the copy either, and the next ``cn-clip index`` of the copy
    embeds them again if it has their files.

    Args:
        library: may be in use by readers and a writer.
        out: from ``claim_backup``.
        thumbnails: whether to copy them; they can be made again.

    Raises:
        LibraryError: the library is damaged, or the files of a model are deleted again and again.
        CNClipError: the disk is full.
    """
    with atomic_folder(out, _COMMAND, check=_own(), also=_OF_READERS) as folder:
        for attempt in range(_ATTEMPTS):
            _copy_database(library, folder)
            try:
                images = _copy_vectors(library, folder)
                break
            except LibraryError:  # a change of the model has deleted the old vectors meanwhile
                if attempt == _ATTEMPTS - 1:
                    raise
        shutil.copyfile(library.path / ABOUT, folder / ABOUT)
        if thumbnails:
            _copy_thumbnails(library, folder)
        _leave_wal(folder)
    return images


def _copy_database(library: LibraryFolder, folder: Path) -> None:
    target = folder / DATABASE
    target.unlink(missing_ok=True)
    with database.map_errors(library.path), closing(sqlite3.connect(target)) as copy:
        library.database.connection.backup(copy)


def _copy_vectors(library: LibraryFolder, folder: Path) -> int:
    shutil.copyfile(library.path / ABOUT, folder / ABOUT)
    with LibraryFolder(folder, writable=True) as copy:
        for model in copy.models():
            library.vector_file(model).copy_to(copy.vector_file(model), model.rows)
            # Removed while this was copied.
            lost, _invalid = wrong_rows(copy, model, copy.vector_file(model).open(model.rows))
            with copy.database.transaction() as connection:
                connection.executemany(
                    "INSERT OR IGNORE INTO missing VALUES (?, ?)",
                    [(model.id, row + 1) for row in lost.tolist()],
                )
        (images,) = copy.query("SELECT COUNT(*) FROM images WHERE files > 0")[0]
    return int(images)


def _copy_thumbnails(library: LibraryFolder, folder: Path) -> None:
    with LibraryFolder(folder) as copy:
        digests = copy.query("SELECT digest FROM images")
    for (digest,) in digests:
        target = thumbnail_path(folder, digest)
        with suppress(FileNotFoundError):
            content = thumbnail_path(library.path, digest).read_bytes()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def _leave_wal(folder: Path) -> None:
    """Leave one file, without a write-ahead log, so that a copy of it is complete."""
    with database.map_errors(folder), closing(sqlite3.connect(folder / DATABASE)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")


def _own() -> OutputCheck:
    """Return a check that a folder is a backup that was read, but not written since."""

    def own(folder: Path) -> Collection[str]:
        stamped = stamped_files(folder, _COMMAND)
        read = (name for name in entries(folder) if name.startswith(f"{CACHE}/"))
        return {*stamped, *read} if stamped else ()

    return own_folder(_COMMAND, own)

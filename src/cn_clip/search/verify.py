"""A library checked: database, vectors, files and thumbnails. Nothing is changed."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cn_clip.errors import CNClipError, LibraryError
from cn_clip.search import database
from cn_clip.search.folder import LibraryFolder, StoredModel
from cn_clip.search.migration import unused_vectors
from cn_clip.search.reading import digest_of
from cn_clip.search.roots import Entry, Root, display_path
from cn_clip.search.thumbnails import stored_thumbnails
from cn_clip.search.vector_file import Rows
from cn_clip.search.words import TEXTS
from cn_clip.text import path_text
from cn_clip.translation import N_, _, translate

SAMPLE = 100  # files whose content is read by default
_LENGTH_TOLERANCE = (
    0.01  # of a unit vector in float16, whose rounding changes it by less than 0.001
)
_BLOCK = 1 << 16  # rows
_TABLES = (
    "models", "missing", "roots", "images", "files", "caption_words", "image_words", "erasures",
    "versions",
)  # fmt: skip
_LISTED = 20  # messages of SQLite

REPAIR = N_("cn-clip library repair")
BEYOND = N_("restore a backup, or index the folders again into a new library")
INDEX = N_("cn-clip index")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a library, and the command that puts it right."""

    text: str
    remedy: str


@dataclass(slots=True)
class Verification:
    """What was checked.

    Attributes:
        images, vectors, files: numbers of rows, vectors of all models, and files whose content was
            compared.
        unreadable: files of the sample that cannot be read now; no problem of the library.
        problems: what is wrong.
    """

    images: int = 0
    vectors: int = 0
    files: int = 0
    unreadable: int = 0
    problems: list[Problem] = field(default_factory=list)


def verify(
    library: LibraryFolder,
    *,
    all_files: bool = False,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Verification:
    """Check a library.

    Args:
        library: may be read-only, and written by another process meanwhile.
        all_files: compare the content of all files with their digests, not only of a sample.
        on_progress: called with the number of files read and their total.

    Raises:
        LibraryError: the database cannot be read at all.
    """
    found = Verification()
    damage = database_damage(library)
    if damage:
        found.problems += [
            Problem(_("database: {text}", text=text), translate(BEYOND)) for text in damage
        ]
        return found
    (found.images,) = library.query("SELECT COUNT(*) FROM images")[0]
    with library.reading():
        found.problems += _facts(library)
    for model in library.models():
        found.vectors += model.rows
        found.problems += _vectors(library, model)
    if unused := unused_vectors(library):
        text = _("{file} belongs to no model", file=unused[0].name)
        found.problems.append(Problem(text, translate(REPAIR)))
    found.problems += _thumbnails(library)
    _files(library, found, all_files, on_progress)
    return found


def database_damage(library: LibraryFolder) -> list[str]:
    """Return what SQLite finds wrong with the database; empty if nothing."""
    with database.map_errors(library.path):
        return _damage(library.database.connection)


def _damage(connection: sqlite3.Connection) -> list[str]:
    try:
        rows = connection.execute(f"PRAGMA integrity_check({_LISTED})").fetchall()
        messages = [str(text) for (text,) in rows if text != "ok"]
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema")}
        messages += [
            _("it has no table {name}", name=name) for name in _TABLES if name not in tables
        ]
        for table, row, parent, _index in connection.execute("PRAGMA foreign_key_check"):
            messages.append(
                _(
                    "row {row} of {table} refers to no row of {parent}",
                    row=row,
                    table=table,
                    parent=parent,
                )
            )
    except sqlite3.DatabaseError as error:
        if not database.is_damage(error):  # such as a lock of another process
            raise
        return [str(error)]  # it stops the check itself
    return messages[:_LISTED]


def wrong_rows(
    library: LibraryFolder, model: StoredModel, rows: Rows
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows that are zero but should not be, and those that are no unit vectors.

    Args:
        library: of the vectors.
        model: of the vectors.
        rows: float16 (N, D).
    """
    zero, invalid = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.sqrt(np.einsum("nd,nd->n", block, block))
            fits = np.abs(lengths - 1) <= _LENGTH_TOLERANCE  # False for NaN
        zero.append(np.flatnonzero(lengths == 0) + start)
        invalid.append(np.flatnonzero(~fits & (lengths != 0)) + start)
    hidden = library.query(
        "SELECT image FROM missing WHERE model = ? UNION SELECT image FROM erasures", (model.id,)
    )
    expected = np.array(hidden, np.int64).ravel() - 1
    return np.setdiff1d(np.concatenate(zero), expected), np.concatenate(invalid)


def miscounted_images(library: LibraryFolder) -> int:
    """Return the number of images whose count of files is wrong."""
    count: int = library.query(
        "SELECT COUNT(*) FROM images WHERE files != (SELECT COUNT(*) FROM files "
        "WHERE files.image = images.id AND files.present)"
    )[0][0]
    return count


def _facts(library: LibraryFolder) -> Iterator[Problem]:
    (pending,) = library.query("SELECT COUNT(*) FROM erasures WHERE pending > 0")[0]
    if pending:
        yield Problem(
            _("{count:,} removed images are not erased yet", count=pending), translate(REPAIR)
        )
    if count := miscounted_images(library):
        yield Problem(
            _("{count:,} images have a wrong number of files", count=count), translate(REPAIR)
        )
    active = library.active_model()
    (last,) = library.query("SELECT COALESCE(MAX(id), 0) FROM images")[0]
    if last > (0 if active is None else active.rows):
        yield Problem(
            _(
                "image {image:,} lies beyond the {rows:,} rows of vectors",
                image=last,
                rows=0 if active is None else active.rows,
            ),
            translate(REPAIR),
        )
    for words, statement in TEXTS.items():
        stored = {row for (row,) in library.query(f"SELECT rowid FROM {words}")}
        wanted = {row for (row, _text) in library.query(statement)}
        if stored != wanted:
            yield Problem(
                _(
                    "{count:,} rows of {words} do not fit the texts",
                    count=len(stored ^ wanted),
                    words=words,
                ),
                translate(REPAIR),
            )


def _vectors(library: LibraryFolder, model: StoredModel) -> Iterator[Problem]:
    file = library.vector_file(model)
    name = path_text(file.path.name)
    stored = min(file.rows_stored(), model.rows)
    if stored < model.rows:
        yield Problem(
            _(
                "{file} holds {stored:,} vectors, not {rows:,}",
                file=name,
                stored=stored,
                rows=model.rows,
            ),
            translate(REPAIR),
        )
    zero, invalid = wrong_rows(library, model, file.open(stored))
    if len(zero):
        yield Problem(
            _("{file}: {count:,} vectors are zero", file=name, count=len(zero)), translate(REPAIR)
        )
    if len(invalid):
        yield Problem(
            _(
                "{file}: {count:,} vectors are no unit vectors, such as that of image {image}",
                file=name,
                count=len(invalid),
                image=int(invalid[0]) + 1,
            ),
            translate(REPAIR),
        )
    if model.state == "active":
        (missing,) = library.query(
            "SELECT COUNT(*) FROM missing JOIN images ON images.id = missing.image "
            "WHERE model = ? AND images.files > 0",
            (model.id,),
        )[0]
        if missing:
            yield Problem(
                _("{count:,} images have no vector and are not found", count=missing),
                translate(INDEX),
            )


def _thumbnails(library: LibraryFolder) -> Iterator[Problem]:
    known = {bytes(digest) for (digest,) in library.query("SELECT digest FROM images")}
    orphans = sum(digest not in known for _path, digest in stored_thumbnails(library.path))
    if orphans:
        yield Problem(
            _("{count:,} thumbnails belong to no image", count=orphans), translate(REPAIR)
        )


def _files(
    library: LibraryFolder,
    found: Verification,
    all_files: bool,
    on_progress: Callable[[int, int | None], None],
) -> None:
    """Compare files with their digests: a difference that size and time do not show is damage."""
    (count,) = library.query("SELECT COUNT(*) FROM files WHERE present AND image IS NOT NULL")[0]
    total = count if all_files else min(count, SAMPLE)
    rows = library.query(
        "SELECT roots.kind, roots.location, files.name, files.position, files.size, files.mtime, "
        "images.digest FROM files JOIN roots ON roots.id = files.root "
        "JOIN images ON images.id = files.image WHERE files.id IN "
        "(SELECT id FROM files WHERE present AND image IS NOT NULL ORDER BY RANDOM() LIMIT ?) "
        "ORDER BY files.id",
        (total,),
    )
    roots: dict[bytes, Root] = {}
    for number, (kind, location, name, position, size, mtime, digest) in enumerate(rows, 1):
        on_progress(number, total)
        root = roots.setdefault(location, Root(kind, location))
        try:
            content = root.read(Entry(name, 0, 0, position))
        except (CNClipError, OSError):
            found.unreadable += 1
            continue
        found.files += 1
        if digest_of(content) == digest or _has_changed(root, name, size, mtime):
            continue
        found.problems.append(
            Problem(
                _(
                    "{path} has other content than when it was indexed, with the same size and "
                    "time: the disk may be failing",
                    path=display_path(kind, location, name),
                ),
                _("restore the file from a backup"),
            )
        )


def _has_changed(root: Root, name: bytes, size: int, mtime: int) -> bool:
    """Return whether a file's size or time is another; ``cn-clip index`` then reads it again."""
    if root.kind != "folder":
        return True
    with suppress(OSError):
        status = root.file(name).stat()
        return (status.st_size, status.st_mtime_ns) != (size, mtime)
    return True


def check_database(library: LibraryFolder) -> None:
    """Check that the database is intact.

    Raises:
        LibraryError: it is damaged; the message names the way out.
    """
    damage = database_damage(library)
    if damage:
        raise LibraryError(
            _(
                "the database of {library} is damaged beyond repair ({reason}); {remedy}",
                library=path_text(library.path),
                reason=damage[0],
                remedy=translate(BEYOND),
            )
        )

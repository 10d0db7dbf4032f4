"""A library on disk: its models, vectors and facts, opened for searching."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from cn_clip.embedder import Embedder
from cn_clip.errors import LibraryError, UsageError
from cn_clip.format_version import FIELD
from cn_clip.outputs import json_object_at
from cn_clip.publish import is_leftover, map_write_errors, write_text
from cn_clip.search import database
from cn_clip.search.database import Database
from cn_clip.search.places import ABOUT, LIBRARY, check_library
from cn_clip.search.vector_file import Rows, VectorFile
from cn_clip.text import path_text
from cn_clip.translation import _

CACHE = "cache"
_LOCK = ".lock"
_WRITER = ".writer.json"


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model whose vectors a library holds; columns of the table ``models``."""

    id: int
    name: str
    fingerprint: str
    derived_from: str | None
    precision: str
    fast_decode: bool
    dim: int
    logit_scale: float
    rows: int
    state: str
    created: str

    @property
    def file_name(self) -> str:
        return f"vectors-{self.id}.f16"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a search sees: the active model, its vectors (N, D), and which rows are searchable.

    Attributes:
        model: the active model.
        vectors: float16 (N, D); image i is row i - 1.
        searchable: bool (N,), or None if all rows are.
    """

    model: StoredModel
    vectors: Rows
    searchable: npt.NDArray[np.bool_] | None

    @property
    def count(self) -> int:
        """Number of searchable images."""
        if self.searchable is None:
            return len(self.vectors)
        return int(np.count_nonzero(self.searchable))


class LibraryFolder:
    """The folder of a library: its database and vector files.

    Thread-safe. Any number of processes may read while one writes.

    Attributes:
        path: of the folder, absolute.
        database: connections to its database.
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        """Open an existing library.

        Raises:
            LibraryError: there is none, it is damaged, or of a newer version.
        """
        check_library(path)
        self.path = Path(os.path.realpath(path))
        self.database = Database(self.path, writable=writable)
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._seen = threading.local()  # the version that a thread's connection saw last

    def close(self) -> None:
        """Close the database."""
        self.database.close()
        self._snapshot = None

    def __enter__(self) -> LibraryFolder:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.close()

    def models(self) -> list[StoredModel]:
        """Return all models, the oldest first."""
        names = ", ".join(StoredModel.__slots__)
        rows = self.query(f"SELECT {names} FROM models ORDER BY id")
        return [StoredModel(*row) for row in rows]

    def active_model(self) -> StoredModel | None:
        """Return the model whose vectors are searched; None in an empty library."""
        return next((model for model in self.models() if model.state == "active"), None)

    def vector_file(self, model: StoredModel) -> VectorFile:
        """Return the vector file of a model."""
        return VectorFile(self.path / model.file_name, model.dim)

    def query(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return all rows of a query.

        Raises:
            LibraryError: the database is damaged.
        """
        with database.map_errors(self.path):
            return self.database.connection.execute(statement, values).fetchall()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Yield this thread's connection in a read transaction: its queries see one state.

        Raises:
            LibraryError: the database is damaged.
        """
        connection = self.database.connection
        with database.map_errors(self.path):
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                with suppress(sqlite3.Error):  # an error may have ended it
                    connection.execute("COMMIT")

    def snapshot(self) -> Snapshot:
        """Return the current state; it is read again after another process has written.

        Raises:
            LibraryError: the library is empty or damaged.
        """
        connection = self.database.connection
        with self._lock, database.map_errors(self.path):
            # data_version changes with the commits of other connections only.
            version = connection.execute("PRAGMA data_version").fetchone()[0]
            seen = (version, connection.total_changes)
            if self._snapshot is None or seen != getattr(self._seen, "value", None):
                self._snapshot, self._seen.value = self._read_snapshot(connection), seen
            return self._snapshot

    def _read_snapshot(self, connection: sqlite3.Connection) -> Snapshot:
        connection.execute("BEGIN")
        try:
            model = self.active_model()
            if model is None:
                raise LibraryError(
                    _(
                        "{library} holds no images; add some with: cn-clip index FOLDER",
                        library=path_text(self.path),
                    )
                )
            # The rows of images without a file, or without a vector.
            hidden = connection.execute(
                "SELECT id FROM images WHERE files = 0 "
                "UNION SELECT image FROM missing WHERE model = ? "
                "UNION SELECT image FROM erasures",
                (model.id,),
            ).fetchall()
        finally:
            connection.execute("COMMIT")
        old = self._snapshot
        if old is not None and (old.model.id, old.model.rows) == (model.id, model.rows):
            vectors = old.vectors
        else:
            vectors = self.vector_file(model).open(model.rows)
        searchable = None
        if hidden:
            ids = np.array(hidden, np.int64).ravel()
            searchable = np.ones(model.rows, np.bool_)
            searchable[ids[(ids >= 1) & (ids <= model.rows)] - 1] = False
        return Snapshot(model, vectors, searchable)

    @contextmanager
    def writing(self, task: str, *, wait: bool = False) -> Iterator[None]:
        """Hold the lock of the writer: one process writes at a time.

        Args:
            task: what it does, for the message of a second process.
            wait: whether to wait for another process, with a warning.

        Raises:
            LibraryError: another process writes, and ``wait`` is false.
            CNClipError: the library is read-only.
        """
        with map_write_errors(path_text(self.path)):
            lock = FileLock(self.path / _LOCK, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                if not wait:
                    raise LibraryError(self._held_by()) from None
                warnings.warn(self._held_by(), stacklevel=3)
                lock.acquire(timeout=-1)
        try:
            about = {
                "process": os.getpid(),
                "host": os.uname().nodename if hasattr(os, "uname") else "",
                "task": task,
                "since": now(),
            }
            write_text(self.path / _WRITER, json.dumps(about))
            yield
        finally:
            (self.path / _WRITER).unlink(missing_ok=True)
            lock.release()

    def _held_by(self) -> str:
        about = json_object_at(self.path / _WRITER)
        if not about:
            return _("another process writes to {library}; try later", library=path_text(self.path))
        return _(
            "{library} is being written by `cn-clip {task}` (process {process} on {host}, since "
            "{since}); wait for it to end, or stop it",
            library=path_text(self.path),
            task=about.get("task"),
            process=about.get("process"),
            host=about.get("host"),
            since=about.get("since"),
        )


def now() -> str:
    """Return the current time in UTC, such as ``2024-05-01T12:00:00Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def create(path: Path) -> None:
    """Create an empty library, or complete one whose creation was interrupted.

    Raises:
        UsageError: the folder holds other files.
        CNClipError: the disk is full or read-only.
    """
    if (path / ABOUT).exists():
        check_library(path)
        return
    ours = {database.DATABASE, f"{database.DATABASE}-wal", f"{database.DATABASE}-shm"}
    ours.add(f"{database.DATABASE}-journal")
    try:
        names = (name for name in sorted(os.listdir(path)) if name not in ours)
        other = next((name for name in names if not is_leftover(path / name)), None)
    except FileNotFoundError:
        other = None
    except NotADirectoryError:
        raise UsageError(
            _("{library} is a file; give a new folder", library=path_text(path))
        ) from None
    if other is not None:
        raise UsageError(
            _(
                "{library} is not a library and holds {other}; give a new or empty folder",
                library=path_text(path),
                other=path_text(other),
            )
        )
    with map_write_errors(path_text(path)):
        path.mkdir(parents=True, exist_ok=True)
    database.create(path)
    about = {FIELD: str(LIBRARY), "created": now()}
    write_text(path / ABOUT, json.dumps(about, indent=2) + "\n")


def add_model(connection: sqlite3.Connection, name: str, embedder: Embedder, state: str) -> int:
    """Add a row to ``models``; return its id."""
    cursor = connection.execute(
        "INSERT INTO models (name, fingerprint, derived_from, precision, fast_decode, dim, "
        "logit_scale, state, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            name,
            embedder.fingerprint,
            embedder.derived_from,
            embedder.backend.precision,
            embedder.fast_decode,
            embedder.dim,
            embedder.logit_scale,
            state,
            now(),
        ),
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid

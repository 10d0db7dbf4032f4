"""The SQLite database of a library: its schema, and connections to it."""

from __future__ import annotations

import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from cn_clip.errors import CNClipError, LibraryError, UsageError
from cn_clip.text import path_text
from cn_clip.translation import _

DATABASE = "library.db"
_BUSY_SECONDS = 30.0  # a reader waits for a writer's commit, and the other way round
# File systems on which the shared memory of SQLite's write-ahead log does not work.
_REMOTE = (
    "9p", "afs", "ceph", "cifs", "drvfs", "fuse", "gluster", "lustre", "ncpfs", "nfs", "smb",
    "vboxsf", "virtiofs", "vmhgfs",
)  # fmt: skip
_MOUNT_ESCAPE = re.compile(r"\\([0-7]{3})")  # of a space, tab, newline or backslash
_LOCAL_FUSE = ("fuseblk", "fuse.ext", "fuse.ntfs", "fuse.exfat")


class Database:
    """Connections to one database: one for each thread, opened on first use.

    Args:
        folder: of the library.
        writable: whether to open for writing.
    """

    def __init__(self, folder: Path, *, writable: bool = False) -> None:
        self._folder = folder
        self._writable = writable
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: dict[threading.Thread, sqlite3.Connection] = {}

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection of this thread.

        Raises:
            LibraryError: the database is damaged or cannot be read.
        """
        found: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if found is None:
            with map_errors(self._folder):
                found = _connect(self._folder, writable=self._writable)
            self._local.connection = found
            with self._lock:
                self._close_of_ended_threads()
                self._open[threading.current_thread()] = found
        return found

    def _close_of_ended_threads(self) -> None:
        """Close what threads that have ended left: a server or --watch starts new ones for ever."""
        for thread in [thread for thread in self._open if not thread.is_alive()]:
            self._open.pop(thread).close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield this thread's connection in a write transaction, committed at the end.

        Raises:
            CNClipError: the disk is full or read-only; nothing was changed.
            LibraryError: the database is damaged.
        """
        connection = self.connection
        with map_errors(self._folder):
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite may have rolled back already
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._lock:
            for connection in self._open.values():
                connection.close()
            self._open.clear()
        self._local = threading.local()


def create(folder: Path) -> None:
    """Create the database of a new library.

    Raises:
        CNClipError: the disk is full or read-only.
    """
    with map_errors(folder):
        connection = _connect(folder, writable=True, create=True)
        try:
            schema = files("cn_clip.search").joinpath("schema.sql").read_text(encoding="utf-8")
            connection.execute("BEGIN IMMEDIATE")
            if not connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone():
                for statement in _statements(schema):
                    connection.execute(statement)
            connection.execute("COMMIT")
        finally:
            connection.close()


@contextmanager
def map_errors(folder: Path) -> Iterator[None]:
    """Turn the errors of SQLite and its module into ours."""
    name = path_text(folder)
    try:
        yield
    except OverflowError:  # of an integer; SQLite has 64 bits
        raise UsageError(
            _("a number is above 2^63, the limit of the database; give a smaller one")
        ) from None
    except sqlite3.DatabaseError as error:
        primary = _primary_code(error)
        if is_damage(error):
            raise LibraryError(
                _(
                    "the database of {library} is damaged ({error}); try cn-clip library repair, "
                    "else restore a backup, or index again into a new library",
                    library=name,
                    error=error,
                )
            ) from None
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise LibraryError(
                _(
                    "{library} is busy: another process writes to it; try again later",
                    library=name,
                )
            ) from None
        if primary in (
            sqlite3.SQLITE_FULL,
            sqlite3.SQLITE_READONLY,
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_PERM,
        ):
            raise CNClipError(
                _(
                    "{library} cannot be read or written ({error}); nothing was lost. Free some "
                    "space, or check its permissions",
                    library=name,
                    error=error,
                )
            ) from error
        raise


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether SQLite says that the database itself is damaged, or lacks a table."""
    code = _primary_code(error)
    no_table = code == sqlite3.SQLITE_ERROR and "no such table" in str(error)
    return no_table or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _primary_code(error: sqlite3.Error) -> int | None:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _connect(folder: Path, *, writable: bool, create: bool = False) -> sqlite3.Connection:
    path = folder / DATABASE
    if not create and not os.path.lexists(path):
        raise LibraryError(
            _(
                "{library} has lost its {file}; restore a backup, or index again into a new "
                "library",
                library=path_text(folder),
                file=DATABASE,
            )
        )
    mode = "rwc" if create else "rw" if writable or _can_write(folder) else _read_only(path)
    # Not closed by `with`: that only commits.
    connection = sqlite3.connect(
        f"file:{quote(os.fsencode(path))}?mode={mode}",
        uri=True,
        timeout=_BUSY_SECONDS,
        isolation_level=None,  # transactions are explicit
        check_same_thread=False,  # Database.close closes the connections of other threads
    )
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")  # removed texts are overwritten
        connection.execute("PRAGMA cache_size = -16384")  # 16 MiB
        if writable:
            connection.execute(f"PRAGMA journal_mode = {journal_mode(folder)}")
            connection.execute("PRAGMA synchronous = FULL")
        else:
            connection.execute("PRAGMA query_only = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def journal_mode(folder: Path) -> str:
    """Return ``WAL`` on a local file system, ``DELETE`` on others.

    The write-ahead log lets readers go on during a write, but its index is memory shared between
    processes, which network file systems do not keep consistent (sqlite.org/wal.html).
    """
    kind = _file_system(folder)
    remote = kind.startswith(_REMOTE) and not kind.startswith(_LOCAL_FUSE)
    return "DELETE" if remote else "WAL"


def _file_system(folder: Path) -> str:
    """Return the type of file system that a folder is on, from /proc/mounts; empty if unknown."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    real = os.path.realpath(folder)
    best, kind = "", ""
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount = _MOUNT_ESCAPE.sub(lambda octal: chr(int(octal[1], 8)), fields[1])
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):  # the last mount on a point hides earlier ones
            best, kind = mount, fields[2]
    return kind


def _can_write(folder: Path) -> bool:
    """Return whether readers may create the shared memory of the write-ahead log."""
    return os.access(folder, os.W_OK) and os.access(folder / DATABASE, os.W_OK)


def _read_only(path: Path) -> str:
    """Return the mode for a read-only disk, where no lock and no shared memory can be created."""
    log = path.with_name(f"{path.name}-wal")
    return "ro" if log.exists() and log.stat().st_size else "ro&immutable=1"


def _statements(script: str) -> Iterator[str]:
    """Split an SQL script into statements, triggers whole."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""

"""Where a bulk run writes: a folder, local or shared, or a bucket such as ``s3://bucket/name``.

Names are relative, with ``/``. A file appears under its name only when it is complete.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from cn_clip.bulk.lease import BucketLease, holder_of, this_process
from cn_clip.data.sources.remote import is_remote, locate, obstore, request
from cn_clip.errors import CNClipError, UsageError
from cn_clip.publish import flush
from cn_clip.text import path_text
from cn_clip.translation import _

WORK = ".work"  # folder of unfinished files, locks and the notes of running shards
_BUCKETS = ("s3", "gs", "az", "oss")
_PAGE = 1000  # names per request of a listing


class BusyError(CNClipError):
    """Another process works on the same shard, or drives the same run."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in a listing; ``modified`` is in seconds, by the clock of the store alone."""

    name: str
    size: int
    modified: float


class Store(Protocol):
    """A folder or a bucket.

    Attributes:
        name: for messages.
        location: what ``open_store`` opens it by, on another machine too.
    """

    name: str
    location: str

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """Return a file, or a part of it; None if it does not exist."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that does not exist yet; return False if it does.

        Of several processes one succeeds.
        """
        ...

    def note(self, name: str, content: bytes) -> None:
        """Write or replace a small file that may be lost with the machine."""
        ...

    def publish(self, name: str, file: Path) -> None:
        """Move a file of ``working`` to its name, durably; an existing file is replaced."""
        ...

    def settle(self, folder: str) -> None:
        """Make the names that were published to a folder durable."""
        ...

    def entries(self, folder: str) -> Iterator[Entry]:
        """Yield the files in a folder, in any order; none if it does not exist."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        ...

    def working(self, name: str) -> AbstractContextManager[Path]:
        """Yield an empty local folder for unfinished files, removed at the end.

        Raises:
            BusyError: another process has it, where the store has locks.
        """
        ...

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold a lock, which ends with this process.

        Raises:
            BusyError: another process holds it; the message names it.
        """
        ...


def open_store(given: str) -> Store:
    """Return the store at a path or URL; nothing is read or written.

    Raises:
        UsageError: the URL cannot be written to, or obstore is missing.
    """
    if not given or "\0" in given:
        raise UsageError(_("--out is {given!r}; give a folder, or a URL", given=given))
    if not is_remote(given):
        return FolderStore(Path(os.path.abspath(os.path.expanduser(given))))
    scheme = given.partition("://")[0]
    if scheme not in _BUCKETS:
        raise UsageError(
            _(
                "{url} cannot be written to; give a folder, or a URL of {schemes}",
                url=given,
                schemes=", ".join(_BUCKETS),
            )
        )
    return BucketStore(given.rstrip("/"))


class FolderStore:
    """A folder on this machine, or on a file system that all machines share."""

    def __init__(self, root: Path) -> None:
        self.root, self.name, self.location = root, path_text(root), os.fspath(root)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        try:
            with (self.root / name).open("rb") as stream:
                stream.seek(start)
                return stream.read(-1 if stop is None else stop - start)
        except FileNotFoundError:
            return None

    def create(self, name: str, content: bytes) -> bool:
        target = self.root / name
        if target.exists():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._temporary() as temporary:
            temporary.write_bytes(content)
            flush(temporary)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            except (OSError, NotImplementedError):  # no hard links; ``working`` excludes others
                if target.exists():
                    return False
                os.replace(temporary, target)
        self.settle(os.path.dirname(name))
        return True

    def note(self, name: str, content: bytes) -> None:
        with self._temporary() as temporary:
            temporary.write_bytes(content)
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, self.root / name)

    def publish(self, name: str, file: Path) -> None:
        flush(file)
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, self.root / name)

    def settle(self, folder: str) -> None:
        if not hasattr(os, "O_DIRECTORY"):  # Windows
            return
        handle = os.open(self.root / folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # some network file systems refuse it
                os.fsync(handle)
        finally:
            os.close(handle)

    def entries(self, folder: str) -> Iterator[Entry]:
        try:
            with os.scandir(self.root / folder) as listing:
                for entry in listing:
                    with suppress(FileNotFoundError):  # removed meanwhile
                        status = entry.stat()
                        if entry.is_file():
                            yield Entry(entry.name, status.st_size, status.st_mtime)
        except (FileNotFoundError, NotADirectoryError):
            return

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    @contextmanager
    def working(self, name: str) -> Iterator[Path]:
        folder = self.root / WORK / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f"{folder.name}.lock")
        with _locked(lock, lambda: _("another process works on {name}", name=name)):
            shutil.rmtree(folder, ignore_errors=True)  # of a killed process
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            # Only now, after success: whoever opened the file before sees that the work is done.
            lock.unlink(missing_ok=True)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        path = self.root / WORK / name
        path.parent.mkdir(parents=True, exist_ok=True)
        note = path.with_name(f"{path.name}.holder")

        def busy() -> str:
            holder = self.read(f"{WORK}/{note.name}") or b""
            return holder_of(self.name, holder.decode(errors="replace"))

        with _locked(path, busy):
            try:
                note.write_text(this_process(), encoding="utf-8")
                yield
            finally:
                note.unlink(missing_ok=True)

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """Yield the path of a new file on the same file system."""
        folder = self.root / WORK
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{secrets.token_hex(8)}.new"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, busy: Callable[[], str]) -> Iterator[None]:
    """Hold the lock of a file, where the file system has locks.

    Raises:
        BusyError: another process holds it; with the message that ``busy`` returns.
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(busy()) from None
    except NotImplementedError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


class BucketStore:
    """A bucket, or a part of one below a prefix."""

    def __init__(self, url: str) -> None:
        obstore()
        self.name, self.location = path_text(url), url

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        store, path = self._locate(name)
        options: dict[str, Any] = {} if stop is None else {"options": {"range": (start, stop)}}

        def get() -> bytes | None:
            try:
                return bytes(obstore().get(store, path, **options).bytes())
            except (_errors().NotFoundError, FileNotFoundError):
                return None

        if stop is not None and stop <= start:
            return b""
        return request(f"{self.name}/{name}", get)

    def create(self, name: str, content: bytes) -> bool:
        store, path = self._locate(name)

        def put() -> bool:
            try:
                obstore().put(store, path, content, mode="create", use_multipart=False)
                return True
            except (_errors().AlreadyExistsError, _errors().PreconditionError):
                return False

        # After a lost answer, the second attempt finds what the first one wrote.
        return request(f"{self.name}/{name}", put) or self.read(name) == content

    def note(self, name: str, content: bytes) -> None:
        store, path = self._locate(name)
        request(f"{self.name}/{name}", lambda: obstore().put(store, path, content))

    def publish(self, name: str, file: Path) -> None:
        store, path = self._locate(name)
        request(f"{self.name}/{name}", lambda: obstore().put(store, path, file))

    def settle(self, folder: str) -> None:
        """Nothing is left to do: a bucket acknowledges what is durable."""

    def entries(self, folder: str) -> Iterator[Entry]:
        store, prefix = self._locate(folder)
        after: str | None = None
        while True:
            page = request(f"{self.name}/{folder}", lambda: _page(store, prefix, after))  # noqa: B023
            for meta in page:
                name = meta["path"].removeprefix(f"{prefix}/")
                if "/" not in name:
                    yield Entry(name, meta["size"], meta["last_modified"].timestamp())
            if not page:
                return
            after = page[-1]["path"]

    def remove(self, name: str) -> None:
        store, path = self._locate(name)

        def delete() -> None:
            with suppress(_errors().NotFoundError, FileNotFoundError):
                obstore().delete(store, path)

        request(f"{self.name}/{name}", delete)

    @contextmanager
    def working(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="cn_clip-") as folder:
            yield Path(folder)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        store, path = self._locate(f"{WORK}/{name}")
        lease = BucketLease(store, path, self.name)
        holder = lease.acquire()
        if holder is not None:
            raise BusyError(holder_of(self.name, holder))
        try:
            yield
        finally:
            lease.release()

    def _locate(self, name: str) -> tuple[Any, str]:
        store, path = locate(f"{self.location}/{name}")
        return store, re.sub(r"/+", "/", path).rstrip("/")


def _page(store: Any, prefix: str, after: str | None) -> list[Any]:
    """Return the next files of a listing; empty at its end."""
    for page in obstore().list(store, prefix, offset=after, chunk_size=_PAGE):
        if page:
            return list(page)
    return []


def _errors() -> Any:
    return import_module("obstore.exceptions")

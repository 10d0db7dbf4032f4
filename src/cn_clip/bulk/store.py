"""Where a bulk run writes: a folder, local or shared, or a bucket such as ``s3://bucket/name``.

Names are relative, with ``/``. A file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from filelock import FileLock, Timeout

from cn_clip.bulk.lease import BucketLease, holder_of, this_process
from cn_clip.data.sources.remote import is_remote, locate, obstore, request, state_of
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.publish import flush
from cn_clip.text import path_text
from cn_clip.translation import _

WORK = ".work"  # folder of unfinished files, locks and the notes of running shards
LOCKS = f"{WORK}/locks"
STAGED = f"{WORK}/staged"  # files of completions in a bucket, under the names of their attempts
COMMITS = f"{WORK}/commits"  # which attempt counts, of completions that have begun
_PROBE = 1.0  # seconds until a lock that is held for a moment is free again
_THREADS = 16  # locks that are looked at at once
_HOLDER = ".holder"  # ends the name of the note of who holds a lock
_BUCKETS = ("s3", "gs", "az", "oss")
_PAGE = 1000  # names per request of a listing
_NO_FOLDER = (FileNotFoundError, NotADirectoryError)
_SORTED = 1 << 14  # names of a listing that are sorted at a time


class BusyError(CNClipError):
    """Another process works on the same shard, or drives the same run."""


class Entry(NamedTuple):
    """A file in a listing, of which there may be millions.

    Attributes:
        name: in its folder.
        size: in bytes.
        modified: seconds, by the clock of the store alone.
        state: another one after each change: the time of the last change, or made of the ETag.
    """

    name: str
    size: int
    modified: float
    state: int


class Store(Protocol):
    """A folder or a bucket.

    Attributes:
        name: for messages.
        location: what ``open_store`` opens it by, on another machine too.
        readers: files that are read at once, if there are many.
    """

    name: str
    location: str
    readers: int

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

    def names(self, folder: str) -> Iterator[str]:
        """Yield the names of what is in a folder, in any order; none if it does not exist."""
        ...

    def entries(self, folder: str) -> Iterator[Entry]:
        """Yield the files in a folder, in an order that is fast to read them in."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        ...

    def complete(self, name: str, content: bytes, files: Mapping[str, Path | None]) -> bytes:
        """Publish files, then create ``name``, which says that they are there.

        Of several processes the files and the content of one count, and never a mixture.

        Args:
            name: does not exist before.
            content: of ``name``.
            files: name -> a file of ``working``, which is moved; None for one that must not be.

        Returns:
            The content that counts: this one, or that of another process.

        Raises:
            DataError: files may be mixed, in a folder without locks.
        """
        ...

    def completed(self, name: str) -> bytes | None:
        """Return the content of ``name``; None if it is not complete.

        A completion that another process has begun is ended first.

        Raises:
            DataError: the files of a completion are lost.
        """
        ...

    def discard(self, name: str) -> None:
        """Undo a completion; its files stay, until the next one."""
        ...

    def working(self, name: str) -> AbstractContextManager[Path]:
        """Yield an empty local folder for unfinished files, removed at the end.

        Raises:
            BusyError: another process has it, where the store has locks.
        """
        ...

    def lock(
        self, name: str, excludes: Callable[[str], bool] = lambda other: False
    ) -> AbstractContextManager[threading.Event]:
        """Hold a lock, which ends with this process.

        Args:
            name: of the lock.
            excludes: whether a lock of another name must not be held meanwhile.

        Yields:
            An event that is set if another process takes the lock, as this one seems gone.

        Raises:
            BusyError: another process holds it, or one that it excludes; the message names it.
        """
        ...


def open_store(given: str) -> Store:
    """Return the store at a path or URL; nothing is read or written.

    Raises:
        UsageError: the URL cannot be written to, or obstore is missing.
    """
    if not given or not _may_be_path(given):
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


def _may_be_path(given: str) -> bool:
    """Return whether the operating system takes this for a path: no zero, no lone surrogates."""
    try:
        return b"\0" not in os.fsencode(given)
    except UnicodeEncodeError:
        return False


def read_many(store: Store, names: Sequence[str]) -> Iterator[bytes | None]:
    """Yield the contents of files, in order; many are asked for at a time."""

    def read(part: Sequence[str]) -> list[bytes | None]:
        return [store.read(name) for name in part]

    size = -(-len(names) // store.readers) or 1
    with ThreadPoolExecutor(store.readers) as pool:
        for contents in pool.map(read, (names[n : n + size] for n in range(0, len(names), size))):
            yield from contents


class FolderStore:
    """A folder on this machine, or on a file system that all machines share."""

    readers = 8  # more are slower where the files are in the memory of this machine

    def __init__(self, root: Path) -> None:
        self.root, self.name, self.location = root, path_text(root), os.fspath(root)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        try:
            with open(f"{self.location}/{name}", "rb") as stream:  # no Path: there may be many
                if start:
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

    def names(self, folder: str) -> Iterator[str]:
        with suppress(*_NO_FOLDER), os.scandir(self.root / folder) as listing:
            for entry in listing:
                yield entry.name

    def entries(self, folder: str) -> Iterator[Entry]:
        with suppress(*_NO_FOLDER), os.scandir(self.root / folder) as listing:
            # A listing of many files is in no order of the disk.
            while some := list(islice(listing, _SORTED)):
                for entry in sorted(some, key=os.DirEntry.inode):
                    try:
                        status = entry.stat()
                    except FileNotFoundError:  # removed meanwhile
                        continue
                    if stat.S_ISREG(status.st_mode):
                        yield Entry(entry.name, status.st_size, status.st_mtime, status.st_mtime_ns)

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def complete(self, name: str, content: bytes, files: Mapping[str, Path | None]) -> bytes:
        for each, file in files.items():
            if file is None:
                self.remove(each)
            else:
                self.publish(each, file)
        for folder in {os.path.dirname(each) for each, file in files.items() if file is not None}:
            self.settle(folder)
        if self.create(name, content):
            return content
        raise DataError(
            _(
                "another process completed {name} at the same time, and the file system has no "
                "locks; check it: cn-clip bulk verify {out} --checksums",
                name=name,
                out=self.name,
            )
        )

    def completed(self, name: str) -> bytes | None:
        return self.read(name)

    def discard(self, name: str) -> None:
        self.remove(name)

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
    def lock(
        self, name: str, excludes: Callable[[str], bool] = lambda other: False
    ) -> Iterator[threading.Event]:
        folder = self.root / LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / name, lambda: self._held_by(name)):
            note = folder / f"{name}{_HOLDER}"
            note.write_text(this_process(), encoding="utf-8")  # before the others are looked at
            try:
                for other in sorted(path.name for path in folder.glob(f"*{_HOLDER}")):
                    if (lock := other.removesuffix(_HOLDER)) != name and excludes(lock):
                        self._clear(lock)
                yield threading.Event()
            finally:
                note.unlink(missing_ok=True)

    def _clear(self, lock: str) -> None:
        """Remove the note of the holder of a lock, if it is gone.

        Raises:
            BusyError: it is not.
        """
        path = self.root / LOCKS / lock
        # Others may hold it for a moment, to see the same.
        with _locked(path, lambda: self._held_by(lock), patience=_PROBE):
            path.with_name(f"{lock}{_HOLDER}").unlink(missing_ok=True)

    def _held_by(self, lock: str) -> str:
        holder = self.read(f"{LOCKS}/{lock}{_HOLDER}") or b""
        return holder_of(self.name, holder.decode(errors="replace"))

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
def _locked(path: Path, busy: Callable[[], str], *, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of a file, where the file system has locks.

    Raises:
        BusyError: another process holds it for longer than ``patience`` seconds; with the message
            that ``busy`` returns.
    """
    lock = FileLock(path, timeout=patience)
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

    readers = 32

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

    def names(self, folder: str) -> Iterator[str]:
        for entry in self.entries(folder):
            yield entry.name

    def entries(self, folder: str) -> Iterator[Entry]:
        store, prefix = self._locate(folder)
        after: str | None = None
        while True:
            page = request(f"{self.name}/{folder}", lambda: _page(store, prefix, after))  # noqa: B023
            for meta in page:
                name = meta["path"].removeprefix(f"{prefix}/")
                if "/" not in name:
                    modified = meta["last_modified"].timestamp()
                    yield Entry(name, meta["size"], modified, state_of(meta).version)
            if not page:
                return
            after = page[-1]["path"]

    def remove(self, name: str) -> None:
        store, path = self._locate(name)

        def delete() -> None:
            with suppress(_errors().NotFoundError, FileNotFoundError):
                obstore().delete(store, path)

        request(f"{self.name}/{name}", delete)

    def complete(self, name: str, content: bytes, files: Mapping[str, Path | None]) -> bytes:
        token = secrets.token_hex(8)
        own = {each: file for each, file in files.items() if file is not None}
        for each, file in own.items():
            self.publish(_staged(name, token, each), file)
        commit = {
            "token": token,
            "content": content.decode(),
            "files": list(own),
            "absent": [each for each, file in files.items() if file is None],
        }
        if self.create(_commit(name), json.dumps(commit).encode()):
            counts = self.read(name)
            if counts is None:
                return self._end(name, commit)
            self.remove(_commit(name))  # it was made only after the end of another one
        else:
            counts = self.completed(name)
        self._remove_all(_staged(name, token, each) for each in own)
        if counts is None:
            raise BusyError(_("another process discards {name}", name=name))
        return counts

    def completed(self, name: str) -> bytes | None:
        if (content := self.read(name)) is not None:
            return content
        commit = self.read(_commit(name))
        content = self.read(name)  # again: the commit may have ended between the two
        if content is not None or commit is None:
            return content
        return self._end(name, json.loads(commit))

    def _end(self, name: str, commit: dict[str, Any]) -> bytes:
        """End a completion: copy the files of the attempt that counts, and create ``name``."""
        staged = {each: _staged(name, commit["token"], each) for each in commit["files"]}
        self._remove_all(commit["absent"])
        for each, source in staged.items():
            if self._copy(source, each):
                continue
            if (content := self.read(name)) is not None:  # another process ended it
                return content
            raise DataError(
                _(
                    "{path}: no such file, so {name} cannot be completed; next: cn-clip bulk "
                    "resume {out}",
                    path=f"{self.name}/{source}",
                    name=name,
                    out=self.name,
                )
            )
        content = str(commit["content"]).encode()
        self.create(name, content)
        self.remove(_commit(name))
        self._remove_all(staged.values())
        return content

    def _copy(self, source: str, target: str) -> bool:
        """Copy an object within the bucket; return False if it does not exist."""
        store, path = self._locate(source)
        _same, to = self._locate(target)

        def copy() -> bool:
            try:
                obstore().copy(store, path, to)
                return True
            except (_errors().NotFoundError, FileNotFoundError):
                return False

        return request(f"{self.name}/{target}", copy)

    def _remove_all(self, names: Iterable[str]) -> None:
        for name in names:
            self.remove(name)

    def discard(self, name: str) -> None:
        self.remove(_commit(name))  # first: without ``name``, it would count
        self.remove(name)

    @contextmanager
    def working(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="cn_clip-") as folder:
            yield Path(folder)

    @contextmanager
    def lock(
        self, name: str, excludes: Callable[[str], bool] = lambda other: False
    ) -> Iterator[threading.Event]:
        lease = self._lease(name)
        holder = lease.acquire()
        if holder is not None:
            raise BusyError(holder_of(self.name, holder))
        try:
            self._clear(other for other in self._locks() if other != name and excludes(other))
            yield lease.lost
        finally:
            lease.release()

    def _locks(self) -> list[str]:
        return list(self.names(LOCKS))

    def _clear(self, locks: Iterable[str]) -> None:
        """Free locks whose holders are gone, all at once, as each takes its time.

        Raises:
            BusyError: a holder is not gone.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            for holder in pool.map(lambda lock: self._lease(lock).vacate(), locks):
                if holder is not None:
                    raise BusyError(holder_of(self.name, holder))

    def _lease(self, lock: str) -> BucketLease:
        store, path = self._locate(f"{LOCKS}/{lock}")
        return BucketLease(store, path, self.name)

    def _locate(self, name: str) -> tuple[Any, str]:
        store, path = locate(f"{self.location}/{name}")
        return store, re.sub(r"/+", "/", path).rstrip("/")


def _commit(name: str) -> str:
    return f"{COMMITS}/{os.path.basename(name)}"


def _staged(name: str, token: str, file: str) -> str:
    stem = os.path.splitext(os.path.basename(name))[0]
    return f"{STAGED}/{stem}-{token}-{os.path.basename(file)}"


def _page(store: Any, prefix: str, after: str | None) -> list[Any]:
    """Return the next files of a listing; empty at its end."""
    for page in obstore().list(store, prefix, offset=after, chunk_size=_PAGE):
        if page:
            return list(page)
    return []


def _errors() -> Any:
    return import_module("obstore.exceptions")

"""A folder that a bulk run writes to, on this machine or shared by several."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from filelock import FileLock, Timeout

from cn_clip.bulk.lease import holder_of, this_process
from cn_clip.bulk.store.base import LOCKS, WORK, BusyError, Entry
from cn_clip.errors import DataError
from cn_clip.publish import flush
from cn_clip.text import path_text
from cn_clip.translation import _

_PROBE = 1.0  # seconds until a lock that is held for a moment is free again
_HOLDER = ".holder"  # ends the name of the note of who holds a lock
_NO_FOLDER = (FileNotFoundError, NotADirectoryError)
_SORTED = 1 << 14  # names of a listing that are sorted at a time


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

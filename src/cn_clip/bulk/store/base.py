"""What a bulk run needs of the place that it writes to.

Names are relative, with ``/``. A file appears under its name only when it is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from cn_clip.errors import CNClipError

WORK = ".work"  # folder of unfinished files, locks and the notes of running shards
LOCKS = f"{WORK}/locks"


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


def read_many(store: Store, names: Sequence[str]) -> Iterator[bytes | None]:
    """Yield the contents of files, in order; many are asked for at a time."""

    def read(part: Sequence[str]) -> list[bytes | None]:
        return [store.read(name) for name in part]

    size = -(-len(names) // store.readers) or 1
    with ThreadPoolExecutor(store.readers) as pool:
        for contents in pool.map(read, (names[n : n + size] for n in range(0, len(names), size))):
            yield from contents

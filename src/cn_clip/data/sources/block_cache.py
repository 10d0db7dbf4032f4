"""Blocks of remote files on the local disk, bounded in bytes, shared by all processes of a host.

A block is a file of its content and the CRC-32 of it. A process that fetches a block marks it, so
that others wait for it instead of fetching it too. The blocks used least recently are removed.
"""

from __future__ import annotations

import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cn_clip.cache import cache_folder
from cn_clip.errors import UsageError
from cn_clip.translation import _

LIMIT_VARIABLE = "CN_CLIP_BLOCKS_GB"
BLOCK_SIZE = 4 << 20  # bytes
_DEFAULT_LIMIT = 20.0  # GB
_CHECK_EVERY = 16  # part of the limit that may be written between two evictions
_KEPT = 0.9  # of the limit after an eviction
_CHECKSUM = 4  # bytes
_STALE = 60.0  # seconds after which a mark is of a killed process
_POLL = 0.005  # seconds
_READ_MARKS = 1 << 14  # verified blocks that a process remembers


class BlockCache:
    """A folder of blocks."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Use a folder, which may not exist, for at most ``limit`` bytes."""
        self._folder, self._limit = folder, limit
        self._written = 0
        self._verified: dict[Path, None] = {}

    def read(
        self, key: str, number: int, offset: int, length: int, fetch: Callable[[], bytes]
    ) -> bytes:
        """Read a part of a block; it is fetched if it is missing or damaged.

        Args:
            key: distinguishes the state of the file; letters and digits.
            number: of the block in the file.
            offset, length: of the part, in bytes.
            fetch: returns the whole block.
        """
        path = self._path(key, number)
        while True:
            part = self._stored(path, offset, length)
            if part is not None:
                return part
            if self._mark(path):
                break
            time.sleep(_POLL)
        try:
            content = fetch()
            self._store(path, content)
        finally:
            self._mark_of(path).unlink(missing_ok=True)
        return content[offset : offset + length]

    def has(self, key: str, number: int) -> bool:
        """Return whether a block is stored, or being fetched."""
        path = self._path(key, number)
        return path.exists() or self._mark_of(path).exists()

    def _path(self, key: str, number: int) -> Path:
        return self._folder / key[:2] / f"{key}-{number}"

    def _mark_of(self, path: Path) -> Path:
        return path.with_name(f"{path.name}.mark")

    def _mark(self, path: Path) -> bool:
        """Mark a block as being fetched; return False if another process or thread fetches it."""
        mark = self._mark_of(path)
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            with suppress(OSError):
                if abs(time.time() - mark.stat().st_mtime) > _STALE:
                    mark.unlink(missing_ok=True)
            return False
        except OSError:  # the folder cannot be written: every process fetches for itself
            return True
        return True

    def _stored(self, path: Path, offset: int, length: int) -> bytes | None:
        """Return a part of a stored block; None if it is missing or damaged."""
        try:
            with path.open("rb", buffering=0) as stream:
                if path in self._verified:
                    stream.seek(offset)
                    end = os.fstat(stream.fileno()).st_size - _CHECKSUM
                    return stream.read(max(0, min(length, end - offset)))
                whole = stream.read()
        except OSError:
            return None
        content, checksum = whole[:-_CHECKSUM], whole[-_CHECKSUM:]
        if zlib.crc32(content).to_bytes(_CHECKSUM, "little") != checksum:
            path.unlink(missing_ok=True)
            return None
        if len(self._verified) >= _READ_MARKS:
            self._verified.clear()
        self._verified[path] = None
        with suppress(OSError):
            os.utime(path)  # it was used
        return content[offset : offset + length]

    def _store(self, path: Path, content: bytes) -> None:
        """Store a block, if there is space for it."""
        self._verified.pop(path, None)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
        checksum = zlib.crc32(content).to_bytes(_CHECKSUM, "little")
        for share in (_KEPT, 0.5):
            try:
                temporary.write_bytes(content + checksum)
                os.replace(temporary, path)
                break
            except OSError as error:
                temporary.unlink(missing_ok=True)
                reason = error
                self._evict(share)
        else:
            _warn_full(self._folder, reason)
            return
        self._written += len(content)
        if self._written > self._limit // _CHECK_EVERY:
            self._evict(_KEPT)

    def _evict(self, share: float) -> None:
        """Remove the blocks used least recently, above a share of the limit; of what is stored, if
        that is less."""
        self._written = 0
        lock = FileLock(self._folder / ".lock", timeout=0)
        with suppress(Timeout, OSError, NotImplementedError), lock:
            blocks = sorted(self._blocks())
            total = sum(size for _used, size, _path in blocks)
            allowed = share * (self._limit if share == _KEPT else min(total, self._limit))
            for _used, size, path in blocks:
                if total <= allowed:
                    break
                with suppress(OSError):
                    os.unlink(path)
                    total -= size

    def _blocks(self) -> Iterator[tuple[int, int, str]]:
        """Yield when each block was used, its bytes, and its path."""
        for folder in self._folder.iterdir():
            for entry in os.scandir(folder) if folder.is_dir() else ():
                with suppress(OSError):
                    if not entry.name.endswith(".mark"):
                        status = entry.stat()
                        yield status.st_mtime_ns, status.st_size, entry.path


def default_cache() -> BlockCache:
    """Return the cache in the cache folder, with the limit of ``CN_CLIP_BLOCKS_GB``.

    Raises:
        UsageError: the limit is no number above zero.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(_DEFAULT_LIMIT)
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < 1e9:
        raise UsageError(
            _(
                "{variable} is {text!r}; give a number of gigabytes above zero, such as 20",
                variable=LIMIT_VARIABLE,
                text=text,
            )
        )
    return BlockCache(cache_folder() / "blocks", int(gigabytes * 1e9))


_warned: set[Path] = set()


def _warn_full(folder: Path, error: OSError) -> None:
    if folder not in _warned:
        _warned.add(folder)
        warnings.warn(
            _(
                "blocks of remote files cannot be kept in {folder}: {reason}; they are fetched "
                "anew. Free some space, or set {variable} to another folder",
                folder=folder,
                reason=error.strerror or error,
                variable="CN_CLIP_CACHE",
            ),
            stacklevel=2,
        )

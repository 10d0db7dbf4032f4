"""A bucket that a bulk run writes to, or the part of one below a prefix."""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from cn_clip.bulk.lease import BucketLease, holder_of
from cn_clip.bulk.store.base import LOCKS, WORK, BusyError, Entry
from cn_clip.data.sources.remote import locate, obstore, request, state_of
from cn_clip.errors import DataError
from cn_clip.text import path_text
from cn_clip.translation import _

STAGED = f"{WORK}/staged"  # files of completions in a bucket, under the names of their attempts
COMMITS = f"{WORK}/commits"  # which attempt counts, of completions that have begun
_THREADS = 16  # locks that are looked at at once
_PAGE = 1000  # names per request of a listing


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

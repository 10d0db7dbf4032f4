"""A lock in a bucket: an object that its holder renews, written under conditions on its ETag.

A holder is gone if it does not renew the lock for a while, by the clock of the process that waits:
the clocks of two machines are never compared. A lock is given back by a last write under the same
condition, and not by removing it, which has no condition: it may be another's by then.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from cn_clip.data.sources.remote import obstore, request
from cn_clip.errors import UnavailableError
from cn_clip.translation import _

RENEWAL = 5.0  # seconds between renewals
PATIENCE = 60.0  # seconds without a renewal, after which the holder is gone; a request may take 30
_POLL = 1.0


def this_process() -> str:
    """Return what names this process to people: JSON with host, process id and start."""
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started})


def holder_of(name: str, holder: str) -> str:
    """Return the message that another process drives a run."""
    values: Any = {}
    with suppress(ValueError):
        values = json.loads(holder)
    if not isinstance(values, dict) or "host" not in values:
        return _("another process runs {out}; see: cn-clip bulk status {out}", out=name)
    return _(
        "another process runs {out}: {pid} on {host}, since {started}; see: cn-clip bulk status "
        "{out}",
        out=name,
        pid=values.get("pid"),
        host=values.get("host"),
        started=values.get("started"),
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """The state of a lock.

    Attributes:
        tag: ETag of its object; None without one.
        token: of its holder; None if it is free.
        holder: for people.
    """

    tag: Any
    token: str | None
    holder: str


class BucketLease:
    """The lock object at a path of a store of obstore.

    Attributes:
        lost: set when another process has taken the lock, as this one did not renew it in time.
    """

    def __init__(self, store: Any, path: str, name: str) -> None:
        self._store, self._path, self._name = store, path, name
        self._token = secrets.token_hex(8)
        self._own = {"token": self._token, "holder": this_process()}
        self._tag: Any = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = threading.Event()

    def acquire(self) -> str | None:
        """Take the lock; return its holder if that is another process that renews it."""
        while not self._write(self._own, "create"):
            found, is_alive = self._watch()
            if is_alive:
                return found.holder
            if found.tag is not None and self._write(self._own, {"e_tag": found.tag}):
                break
        self._thread = threading.Thread(target=self._renew, name="cn_clip-lease", daemon=True)
        self._thread.start()
        return None

    def release(self) -> None:
        """Give the lock back, unless it was lost."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(UnavailableError):  # it ends by itself
            self._replace({"token": None})

    def vacate(self) -> str | None:
        """Free the lock if its holder is gone; return the holder if it is not.

        A holder that was only believed gone notices that its lock is lost.
        """
        while True:
            found, is_alive = self._watch()
            if is_alive:
                return found.holder
            if found.token is None or self._write({"token": None}, {"e_tag": found.tag}):
                return None

    def _watch(self) -> tuple[_Found, bool]:
        """Return the state of the lock, and whether another process renews it."""
        seen, since = self._read(), time.monotonic()
        while seen.token not in (None, self._token) and time.monotonic() - since < PATIENCE:
            time.sleep(_POLL)
            found = self._read()
            if found.tag != seen.tag:
                if found.token == seen.token:
                    return found, True
                seen, since = found, time.monotonic()
        return seen, False

    def _renew(self) -> None:
        while not self._stop.wait(RENEWAL):
            with suppress(UnavailableError):  # tried again at the next renewal
                if not self._replace(self._own):
                    self.lost.set()
                    return

    def _replace(self, content: dict[str, Any]) -> bool:
        """Replace the object if it is ours; return False if it is not."""
        while not self._write(content, {"e_tag": self._tag}):
            found = self._read()
            if found.token != self._token:
                return False
            self._tag = found.tag  # the answer to the last write was lost
        return True

    def _write(self, content: dict[str, Any], mode: Any) -> bool:
        """Write the object; return False if the condition does not hold."""
        errors = import_module("obstore.exceptions")
        beat = secrets.token_hex(4)  # another content has another ETag
        body = json.dumps(content | {"beat": beat}).encode()

        def put() -> bool:
            try:
                result = obstore().put(
                    self._store, self._path, body, mode=mode, use_multipart=False
                )
            except (
                errors.AlreadyExistsError, errors.PreconditionError, errors.NotFoundError,
                FileNotFoundError,
            ):  # fmt: skip
                return False
            self._tag = result["e_tag"]
            return True

        return request(self._name, put)

    def _read(self) -> _Found:
        errors = import_module("obstore.exceptions")

        def get() -> _Found:
            try:
                result = obstore().get(self._store, self._path)
            except (errors.NotFoundError, FileNotFoundError):
                return _Found(None, None, "")
            values = json.loads(bytes(result.bytes()))
            return _Found(result.meta["e_tag"], values.get("token"), str(values.get("holder", "")))

        return request(self._name, get)

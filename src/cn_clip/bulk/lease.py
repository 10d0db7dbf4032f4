"""A lock in a bucket: an object that its holder renews, written under conditions on its ETag.

A holder is gone if it does not renew the lock for a while, by the clock of the process that waits:
the clocks of two machines are never compared.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from importlib import import_module
from typing import Any

from cn_clip.data.sources.remote import obstore, request
from cn_clip.errors import UnavailableError
from cn_clip.translation import _

RENEWAL = 5.0  # seconds between renewals
PATIENCE = 30.0  # seconds without a renewal, after which the holder is gone
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


class BucketLease:
    """The lock object at a path of a store of obstore."""

    def __init__(self, store: Any, path: str, name: str) -> None:
        self._store, self._path, self._name = store, path, name
        self._holder = this_process()
        self._token = secrets.token_hex(8)
        self._tag: Any = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = False
        """Whether another process took the lock, after this one did not renew it in time."""

    def acquire(self) -> str | None:
        """Take the lock; return its holder if that is another process that renews it."""
        seen, since = None, time.monotonic()
        while not self._put("create"):
            current = self._read()
            if current is None:  # released meanwhile
                continue
            content, tag = current
            if content.get("token") == self._token:  # our answer was lost
                self._tag = tag
                break
            if tag != seen:
                if seen is not None:  # it was renewed
                    return str(content.get("holder", ""))
                seen, since = tag, time.monotonic()
            if time.monotonic() - since >= PATIENCE and self._put({"e_tag": tag}):
                break
            time.sleep(_POLL)
        self._thread = threading.Thread(target=self._renew, name="cn_clip-lease", daemon=True)
        self._thread.start()
        return None

    def release(self) -> None:
        """Give the lock back, unless it was lost."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if not self.lost:
            with suppress(UnavailableError):  # it ends by itself
                request(self._name, lambda: obstore().delete(self._store, self._path))

    def _renew(self) -> None:
        while not self._stop.wait(RENEWAL):
            with suppress(UnavailableError):  # tried again at the next renewal
                if not self._put({"e_tag": self._tag}):
                    current = self._read()
                    if current is None or current[0].get("token") != self._token:
                        self.lost = True
                        return
                    self._tag = current[1]

    def _put(self, mode: Any) -> bool:
        """Write the object; return False if the condition does not hold."""
        errors = import_module("obstore.exceptions")
        beat = secrets.token_hex(4)  # another content has another ETag
        content = json.dumps({"token": self._token, "holder": self._holder, "beat": beat}).encode()

        def put() -> bool:
            try:
                result = obstore().put(
                    self._store, self._path, content, mode=mode, use_multipart=False
                )
            except (
                errors.AlreadyExistsError, errors.PreconditionError, errors.NotFoundError,
                FileNotFoundError,
            ):  # fmt: skip
                return False
            self._tag = result["e_tag"]
            return True

        return request(self._name, put)

    def _read(self) -> tuple[dict[str, Any], Any] | None:
        errors = import_module("obstore.exceptions")

        def get() -> tuple[dict[str, Any], Any] | None:
            try:
                result = obstore().get(self._store, self._path)
                return json.loads(bytes(result.bytes())), result.meta["e_tag"]
            except (errors.NotFoundError, FileNotFoundError):
                return None

        return request(self._name, get)

"""API keys, stored as hashes in a file; and sessions of the page, signed and bound to a key.

Keys are random, so a plain SHA-256 is enough: a dictionary does not help against 256 bits.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import time
import warnings
from pathlib import Path
from urllib.parse import quote, unquote

from cn_clip.errors import UsageError
from cn_clip.files import MAX_TEXT, as_path, lines_of, read_file
from cn_clip.publish import write_text
from cn_clip.text import path_text
from cn_clip.translation import _

PREFIX = "cnclip-"
SESSION_SECONDS = 7 * 24 * 3600
_LINE = re.compile(r"(\w[\w.-]{0,63}) ([0-9a-f]{64})")
_NAME = re.compile(r"\w[\w.-]{0,63}")
_CHECK_SECONDS = 1.0  # between looks at the file


class Keys:
    """The keys that are valid now; a changed file counts within a second.

    Attributes:
        path: of the file, or None.
    """

    def __init__(self, path: str | None, extra: str | None = None) -> None:
        """Read a file of keys.

        Args:
            path: of the file; None is no file.
            extra: one more key, such as one from the environment.

        Raises:
            UsageError: the file is unreadable or invalid, or has no key.
        """
        self.path = None if path is None else as_path(path)
        self._extra = {} if extra is None else {"environment": hash_of(extra)}
        self._stamp: tuple[int, int, int] | None = None
        self._hashes: dict[str, str] = {}
        self._checked = 0.0
        if self.path is not None:
            self._stamp, self._hashes = _read(self.path)
        if not self._hashes and not self._extra:
            raise UsageError(
                _(
                    "{path} has no key; add one with: cn-clip serve --new-key NAME --keys {path}",
                    path=path_text(self.path or ""),
                )
            )

    def name_of(self, key: str) -> str | None:
        """Return the name of a key; None if it is not valid. Takes the same time for any key."""
        given = hash_of(key)
        found = None
        for name, stored in self._current().items():
            if hmac.compare_digest(given, stored):
                found = name
        return found

    def new_session(self, name: str, secret: bytes) -> str:
        """Return the value of a session cookie, in ASCII, for the key of a name."""
        until = int(time.time()) + SESSION_SECONDS
        return _signed(f"{quote(name, safe='')}:{until}", self._current()[name], secret)

    def name_of_session(self, value: str, secret: bytes) -> str | None:
        """Return the name of the key of a session; None if it is invalid, expired or revoked."""
        quoted, _colon, rest = value.partition(":")
        name = unquote(quoted)
        until, _colon, _signature = rest.partition(":")
        stored = self._current().get(name)
        if stored is None or not (until.isascii() and until.isdigit() and len(until) < 16):
            return None
        expected = _signed(f"{quoted}:{until}", stored, secret)
        valid = hmac.compare_digest(expected.encode(), value.encode("utf-8", "replace"))
        return name if valid and int(until) > time.time() else None

    def _current(self) -> dict[str, str]:
        now = time.monotonic()
        if self.path is not None and now - self._checked > _CHECK_SECONDS:
            self._checked = now
            try:
                if _stamp(self.path) != self._stamp:
                    self._stamp, self._hashes = _read(self.path)
            except (OSError, UsageError):
                # Never the old keys: one of them may just have been revoked.
                self._stamp, self._hashes = None, {}
        return self._extra | self._hashes


def _read(path: Path) -> tuple[tuple[int, int, int], dict[str, str]]:
    """Return the stamp of a file of keys, and the hash of each name."""
    try:
        stamp = _stamp(path)
        lines = lines_of(read_file(path, MAX_TEXT))
    except OSError as error:
        raise UsageError(
            _(
                "--keys {path} cannot be read: {reason}; make it with: cn-clip serve --new-key "
                "NAME --keys {path}",
                path=path_text(path),
                reason=error.strerror,
            )
        ) from None
    except ValueError as error:
        raise UsageError(
            _("--keys {path} cannot be read: {reason}", path=path_text(path), reason=error)
        ) from None
    hashes = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise UsageError(
                _(
                    "line {number} of {path} is not a name and a hash; add keys with: cn-clip "
                    "serve --new-key NAME --keys {path}",
                    number=number,
                    path=path_text(path),
                )
            )
        hashes[match[1]] = match[2]
    return stamp, hashes


def hash_of(key: str) -> str:
    """Return the hash of a key, as the file has it."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def add_key(path: str, name: str) -> str:
    """Add a random key to a file, and return it; only its hash is stored.

    Raises:
        UsageError: the name is invalid or taken, or the file is unreadable.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            _("{name!r} is not a name of a key; give letters, digits, - and _", name=name)
        )
    file = as_path(path)
    lines = []
    if file.exists():
        if name in _read(file)[1]:
            raise UsageError(
                _(
                    "{path} has a key {name} already; delete its line to revoke it, or give "
                    "another name",
                    path=path_text(file),
                    name=name,
                )
            )
        lines = [line for line in lines_of(read_file(file, MAX_TEXT)) if line.strip()]
    key = PREFIX + secrets.token_urlsafe(32)
    write_text(file, "\n".join([*lines, f"{name} {hash_of(key)}"]) + "\n")
    os.chmod(file, 0o600)
    return key


def warn_if_readable(path: str) -> None:
    """Warn if other users can read a file of keys."""
    try:
        mode = as_path(path).stat().st_mode
    except OSError:
        return
    if os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH):
        warnings.warn(
            _("other users can read {path}; run: chmod 600 {path}", path=path), stacklevel=2
        )


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _signed(value: str, stored: str, secret: bytes) -> str:
    signature = hmac.new(secret + stored.encode(), value.encode(), hashlib.sha256).hexdigest()
    return f"{value}:{signature}"

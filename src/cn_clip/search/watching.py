"""Changes of indexed folders as they happen."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from cn_clip.errors import CNClipError, UsageError
from cn_clip.search.roots import Root
from cn_clip.translation import _

# In milliseconds.
_DEBOUNCE = 2000  # that changes are collected before they are reported
_TIMEOUT = 200  # that are waited for a change at a time, and so before the first run


def check_watchfiles() -> None:
    """Check that watchfiles is installed.

    Raises:
        UsageError: it is not.
    """
    if find_spec("watchfiles") is None:
        raise UsageError(
            _("--watch needs watchfiles, which is not installed: pip install watchfiles")
        )


def changes_of(roots: Sequence[Root], library: Path) -> Iterator[None]:
    """Yield once when the folders are watched, then each time that files in them have changed.

    What changes while the caller is busy is reported afterwards. A folder that is replaced, as when
    its disk is mounted again, is watched again.

    Args:
        roots: folders to watch; sources are left out.
        library: the library, which may be in a watched folder: its own files do not count.

    Raises:
        UsageError: none of the roots is a folder that exists.
        CNClipError: the system refuses to watch so many folders.
        KeyboardInterrupt: on Ctrl-C.
    """
    from watchfiles import Change, watch

    own = os.path.join(os.path.realpath(library), "")

    def is_of_user(_unused: Change, path: str) -> bool:
        return not os.path.join(os.path.realpath(os.path.dirname(path)), "").startswith(own)

    folders = [os.fsdecode(root.location) for root in roots if root.kind == "folder"]
    folders = [folder for folder in folders if os.path.isdir(folder)]
    if not folders:
        raise UsageError(_("--watch needs a folder; sources such as csv: cannot be watched"))
    known: dict[str, tuple[int, int]] = {}
    try:
        while True:
            watched = _identities(folders)
            is_new = not watched.items() <= known.items()
            known = watched
            if not watched:
                time.sleep(1)
                continue
            for changes in watch(
                *watched,
                watch_filter=is_of_user,
                debounce=_DEBOUNCE,
                rust_timeout=_TIMEOUT,
                yield_on_timeout=True,
                ignore_permission_denied=True,
            ):
                if changes or is_new:
                    is_new = False
                    yield
                if _identities(folders) != watched:  # a disk was mounted, or is gone
                    break
    except OSError as error:  # such as the limit of inotify
        raise CNClipError(
            _(
                "the folders cannot be watched ({reason}); run cn-clip index without --watch now "
                "and then, or raise the limit of the system",
                reason=error.strerror or error,
            )
        ) from None


def _identities(folders: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the device and inode of each folder that exists."""
    found = {}
    for folder in folders:
        with suppress(OSError):
            status = os.stat(folder)
            found[folder] = status.st_dev, status.st_ino
    return found

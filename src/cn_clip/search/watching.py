"""Changes of indexed folders as they happen."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from cn_clip.errors import UsageError
from cn_clip.search.roots import Root
from cn_clip.translation import _

_DEBOUNCE = 2000  # milliseconds that changes are collected before they are reported


def check_watchfiles() -> None:
    """Check that watchfiles is installed.

    Raises:
        UsageError: it is not.
    """
    if find_spec("watchfiles") is None:
        raise UsageError(
            _("--watch needs watchfiles, which is not installed: pip install watchfiles")
        )


def changes_of(roots: Sequence[Root]) -> Iterator[None]:
    """Yield each time that files of the folders have changed, until a signal.

    Raises:
        UsageError: none of the roots is a folder that exists.
    """
    from watchfiles import watch

    folders = [os.fsdecode(root.location) for root in roots if root.kind == "folder"]
    folders = [folder for folder in folders if os.path.isdir(folder)]
    if not folders:
        raise UsageError(_("--watch needs a folder; sources such as csv: cannot be watched"))
    for _unused in watch(*folders, debounce=_DEBOUNCE, raise_interrupt=True):
        yield

"""Where a bulk run writes: a folder, local or shared, or a bucket such as ``s3://bucket/name``."""

from __future__ import annotations

import os
from pathlib import Path

from cn_clip.bulk.store.base import Store
from cn_clip.bulk.store.bucket import BucketStore
from cn_clip.bulk.store.folder import FolderStore
from cn_clip.data.sources.remote import is_remote
from cn_clip.errors import UsageError
from cn_clip.translation import _

_BUCKETS = ("s3", "gs", "az", "oss")


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

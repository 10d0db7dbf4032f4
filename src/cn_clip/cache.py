"""The cache folder: files that may be deleted at any time, such as indexes and measurements."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cn_clip.errors import CNClipError, UsageError
from cn_clip.files import variable_folder
from cn_clip.publish import write_text

VARIABLE = "CN_CLIP_CACHE"


def cache_folder() -> Path:
    """Return ``$CN_CLIP_CACHE``, by default ``~/.cache/cn_clip``. It may not exist.

    Raises:
        UsageError: the home folder is unknown.
    """
    return variable_folder(VARIABLE, "~/.cache/cn_clip")


def record_path(kind: str, key: Sequence[Any]) -> Path | None:
    """Return the file of a result that is kept for a key of JSON values; None without a cache.

    Args:
        kind: the subfolder.
        key: everything that the result depends on.
    """
    digest = hashlib.blake2b(json.dumps(key).encode(errors="surrogateescape"), digest_size=16)
    try:
        return cache_folder() / kind / f"{digest.hexdigest()}.json"
    except UsageError:  # no home folder
        return None


def keep_record(path: Path | None, values: Mapping[str, Any]) -> None:
    """Write a result to its file, if the cache folder is writable."""
    if path is not None:
        with suppress(OSError, CNClipError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(values))

"""The cache folder: files that may be deleted at any time, such as indexes and measurements."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "CN_CLIP_CACHE"


def cache_folder() -> Path:
    """Return ``$CN_CLIP_CACHE``, by default ``~/.cache/cn_clip``. It may not exist.

    Raises:
        RuntimeError: there is no home folder.
    """
    return Path(os.environ.get(VARIABLE) or "~/.cache/cn_clip").expanduser()

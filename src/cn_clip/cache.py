"""The cache folder: files that may be deleted at any time, such as indexes and measurements."""

from __future__ import annotations

import os
from pathlib import Path

from cn_clip.errors import UsageError
from cn_clip.translation import _

VARIABLE = "CN_CLIP_CACHE"


def cache_folder() -> Path:
    """Return ``$CN_CLIP_CACHE``, by default ``~/.cache/cn_clip``. It may not exist.

    Raises:
        UsageError: the home folder is unknown.
    """
    given = os.environ.get(VARIABLE) or "~/.cache/cn_clip"
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise UsageError(
            _(
                "the home folder of {path} is unknown; set {variable} to a folder",
                path=given,
                variable=VARIABLE,
            )
        ) from None

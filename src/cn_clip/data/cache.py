"""Where indexes of large files are kept, so that they are built once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def index_path(path: Path, suffix: str) -> Path:
    """Return where the index of a file belongs; another place once the file has changed.

    Indexes lie in ``$CN_CLIP_CACHE``, by default ``~/.cache/cn_clip``; they can be deleted.
    """
    root = Path(os.environ.get("CN_CLIP_CACHE") or "~/.cache/cn_clip").expanduser()
    found = path.stat()
    state = f"{path.resolve()}\0{found.st_size}\0{found.st_mtime_ns}"
    digest = hashlib.blake2b(state.encode(), digest_size=8).hexdigest()
    return root / "index" / f"{path.name}-{digest}{suffix}"

"""Files appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UMASK = os.umask(0)  # it can only be read by setting it: once, before there are threads
os.umask(_UMASK)


@contextmanager
def published(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write a file at; on success it replaces ``path`` in one step.

    On any error, Ctrl-C included, the temporary file is removed and ``path`` is as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own: whatever the writer creates in it goes with it.
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary = folder / target.name
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def published_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder to write into; on success it takes the place of ``path``.

    The old folder stays until the new one is complete. What it held besides goes with it.

    Raises:
        NotADirectoryError: there is a file at ``path``.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; give a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        yield new
        flush(new)
        try:
            if target.exists():
                target.rename(old)
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    finally:
        if not old.exists() or target.exists():  # never delete the only copy
            shutil.rmtree(work, ignore_errors=True)


def flush(path: Path) -> None:
    """Bring a file, or all in a folder, to the disk, with the permissions new files get here.

    Whoever publishes does this last; done earlier, beside other work, it is quick then.
    """
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~_UMASK)  # some writers leave 0600
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())

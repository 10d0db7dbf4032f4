"""Atomic writes: a file appears under its name only when it is complete.

Temporary files are in folders named ``.NAME.XXXXXXXX.cn-clip-tmp`` next to the target.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cn_clip.errors import CNClipError

NO_NAME = re.compile("$^")  # matches no name
_TEMPORARY = ".cn-clip-tmp"
_SHOWN_NAME = 40  # bytes of a target's name in the name of its temporary folder


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; on success the file atomically replaces ``path``.

    On any error, Ctrl-C included, the temporary file is removed and ``path`` stays unchanged.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_beside(target)  # a folder: writers may create further temporary files
    try:
        temporary = folder / target.name
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically.

    Raises:
        CNClipError: the file cannot be written; an existing file stays unchanged.
    """
    with map_write_errors(path), atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def map_write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an ``OSError`` while writing an output into a ``CNClipError``."""
    try:
        yield
    except CNClipError:
        raise
    except OSError as error:
        raise CNClipError(
            f"could not write {path}: {error.strerror or error}; nothing was changed. Free some "
            "space or choose another place"
        ) from error


def flush(path: Path) -> None:
    """Sync a file, or all files in a folder, to disk, with the permissions of new files.

    The last step before publishing; calling it earlier, in parallel to other work, makes it fast.
    """
    mode = _mode_of_new_files(path.parent)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(mode)  # some writers leave 0600
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())


def _mode_of_new_files(folder: Path) -> int:
    """Return the permissions of a new file in a folder. Reading the umask would require setting it,
    which affects other threads."""
    probe = folder / f".{secrets.token_hex(8)}"
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()


def temporary_beside(target: Path) -> Path:
    return Path(tempfile.mkdtemp(_TEMPORARY, _prefix(target), target.parent))


def _prefix(target: Path) -> str:
    name = target.name
    while len(os.fsencode(name)) > _SHOWN_NAME:
        name = name[:-1]
    return f".{name}."


def is_leftover(path: Path, old: re.Pattern[str] = NO_NAME) -> bool:
    """Return whether a path is a temporary folder of ours.

    Earlier versions named them ``.NAME.XXXXXXXX``: these are included if NAME matches ``old`` and
    the folder holds no other file.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    if path.name.startswith(".") and path.name.endswith(_TEMPORARY):
        return True
    match = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}", path.name)
    return (
        match is not None
        and old.fullmatch(match[1]) is not None
        and os.access(path, os.R_OK | os.X_OK)
        and set(os.listdir(path)) <= {match[1]}
    )


def sweep(folder: Path, old: re.Pattern[str] = NO_NAME) -> None:
    """Remove temporary folders of killed processes from a folder that no other process writes."""
    for path in [*folder.iterdir()] if folder.is_dir() else []:
        if is_leftover(path, old) and not (path / "old").exists():  # "old" may be the only copy
            shutil.rmtree(path, ignore_errors=True)


def sweep_beside(path: str | os.PathLike[str]) -> None:
    """Remove temporary folders of killed processes for one output that no other process writes."""
    target = Path(os.path.realpath(path))
    if len(os.fsencode(target.name)) > _SHOWN_NAME or not target.parent.is_dir():
        return  # names are cut: the folder may be of another output
    ending = re.compile(re.escape(_prefix(target)) + r"[a-z0-9_]{8}" + re.escape(_TEMPORARY))
    for other in target.parent.iterdir():
        if ending.fullmatch(other.name) and is_leftover(other) and not (other / "old").exists():
            shutil.rmtree(other, ignore_errors=True)

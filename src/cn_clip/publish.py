"""Atomic writes: a file appears under its name only when it is complete.

Temporary files are in folders named ``.NAME.XXXXXXXX.cn-clip-tmp`` next to the target. Their writer
locks them, so the next writer of the target recognises those of killed processes and removes them.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from cn_clip.errors import CNClipError
from cn_clip.translation import _

LOCK = ".lock"
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
    with temporary_beside(target) as folder:  # writers may create further temporary files in it
        temporary = folder / target.name
        yield temporary
        flush(temporary)
        os.replace(temporary, target)


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
            _(
                "could not write {path}: {reason}; nothing was changed. Free some space or choose "
                "another place",
                path=path,
                reason=error.strerror or error,
            )
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


@contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to a target, and remove it, with those of killed processes.

    A folder whose ``old`` is the only copy of the target stays.
    """
    _remove_abandoned(target)
    folder, unlock = _locked_folder(target)
    try:
        yield folder
    finally:
        unlock()  # first: Windows does not remove an open file
        _remove(folder, only_copy=not target.exists())


def _locked_folder(target: Path) -> tuple[Path, Callable[[], None]]:
    """Return a new temporary folder, and the function that unlocks it."""
    from filelock import FileLock, Timeout  # not at the top: it takes 20 ms

    while True:
        folder = Path(tempfile.mkdtemp(_TEMPORARY, _prefix(target), target.parent))
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:  # another process took it for an abandoned one
            continue
        except (OSError, NotImplementedError):  # no locks on this file system
            return folder, lambda: None
        if (folder / LOCK).exists():
            return folder, lock.release
        lock.release()  # of a file that another process has removed since it was created


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary folders of a target whose writers were killed."""
    from filelock import FileLock, Timeout

    is_cut = len(os.fsencode(target.name)) > _SHOWN_NAME  # it may be of another target
    name = re.compile(re.escape(_prefix(target)) + r"[a-z0-9_]{8}" + re.escape(_TEMPORARY))
    for entry in [*os.scandir(target.parent)]:
        folder = Path(entry.path)
        # A writer that has not locked its folder yet has no lock file in it.
        if name.fullmatch(entry.name) and is_leftover(folder) and (folder / LOCK).is_file():
            remove = partial(_remove, folder, only_copy=is_cut or not target.exists())
            with suppress(Timeout, OSError, NotImplementedError):
                with FileLock(folder / LOCK, timeout=0):
                    if os.name != "nt":
                        remove()  # while locked, so that a writer that locks it now sees it
                if os.name == "nt":  # where an open file cannot be removed
                    remove()


def _remove(folder: Path, *, only_copy: bool) -> None:
    if not (only_copy and (folder / "old").exists()):
        shutil.rmtree(folder, ignore_errors=True)


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

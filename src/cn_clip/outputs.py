"""What a command may replace: claims of output paths, and folders stamped by their writer.

A command replaces only what it wrote itself, and only with ``--overwrite``; a command without that
option always replaces its own output. It never touches an input or a folder with other files, and
never writes inside an input folder. ``claim`` checks this before any computation.

Folders are recognised by a stamp, ``.cn-clip.json``, which names the command and its files.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from cn_clip.errors import UsageError
from cn_clip.files import device_inode
from cn_clip.publish import LOCK, NO_NAME, atomic_file, flush, is_leftover, temporary_beside
from cn_clip.translation import _

STAMP = ".cn-clip.json"
_NAME_MAX = 255  # bytes of a file name on common file systems

OutputCheck = Callable[[Path], str | None]
"""Returns why an existing output must not be replaced, or None if it may be."""


def claim(
    out: str | os.PathLike[str],
    check: OutputCheck,
    *,
    kind: Literal["file", "folder"] = "file",
    option: str = "--out",
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool | None = None,
    in_place: bool = False,
    old: re.Pattern[str] = NO_NAME,
) -> Path:
    """Check that an output may be written, without touching it. Return it as a path.

    Args:
        out: the path from the user.
        check: of an existing output, from ``own_file`` or ``own_folder``.
        kind: of the output.
        option: name of the option, for messages.
        inputs: files and folders that are read; missing ones are ignored.
        overwrite: whether to replace an existing output; None if the command always does.
        in_place: the files of a folder are written one by one; the folder itself is not replaced.
        old: as for ``own_folder``.

    Raises:
        UsageError: the output exists, is an input, is inside an input or contains one, was not
            written by the command, or is not writable.
    """
    given = os.fspath(out)
    if not given or "\0" in given:
        raise UsageError(
            _(
                "{option} is {given!r}; give a {kind}",
                option=option,
                given=given,
                kind=_("file") if kind == "file" else _("folder"),
            )
        )
    try:
        target = Path(os.path.realpath(given))  # writes go through a link
    except OSError as error:  # the current folder was deleted
        raise _unwritable(given, error.strerror) from None
    _check_path(target, given, kind, in_place)
    exists = target.is_file() if kind == "file" else next(entries(target, old), None) is not None
    if exists and overwrite is False:
        state = _("exists") if kind == "file" else _("is not empty")
        raise UsageError(
            _(
                "{given} {state}; give another place, or --overwrite to replace it",
                given=given,
                state=state,
            )
        )
    for path in inputs:
        source = _resolved(path)
        if source is None:
            continue  # its reader reports it
        if same_file(target, source):
            raise UsageError(
                _(
                    "{given} is both input and output; give another place for the output",
                    given=given,
                )
            )
        if source.is_dir() and is_within(target, source):
            raise UsageError(
                _(
                    "{given} is inside the input {path}; give a place outside of it",
                    given=given,
                    path=path,
                )
            )
        if is_within(source, target):
            raise UsageError(
                _(
                    "{given} contains the input {path}; give another place for the output",
                    given=given,
                    path=path,
                )
            )
    here = _resolved(".")
    if kind == "folder" and not in_place and here is not None and is_within(here, target):
        raise UsageError(
            _("{given} is the current folder or contains it; give a new folder", given=given)
        )
    reason = check(target) if exists else None
    if reason is not None:
        raise UsageError(_("{given} {reason}; give another place", given=given, reason=reason))
    return Path(given)


def own_file(command: str, is_own: Callable[[Path], bool]) -> OutputCheck:
    """Return a check that a file was written by ``command``; an empty file may be replaced too."""

    def check(path: Path) -> str | None:
        try:
            if not path.stat().st_size or is_own(path):
                return None
        except OSError as error:
            return _("cannot be read ({reason})", reason=error.strerror)
        return _("was not written by `cn-clip {command}`", command=command)

    return check


def starts_with(*starts: bytes) -> Callable[[Path], bool]:
    """Return a predicate: whether a file starts with any of ``starts``."""

    def is_own(path: Path) -> bool:
        with path.open("rb") as stream:
            return stream.read(max(map(len, starts))).startswith(starts)

    return is_own


def reads_as(start: re.Pattern[bytes], end: bytes) -> Callable[[Path], bool]:
    """Return a predicate: whether the first 4 KiB of a file match ``start``, and it ends in
    ``end``. For formats of others, which have no room for a mark of ours."""

    def is_own(path: Path) -> bool:
        with path.open("rb") as stream:
            head = stream.read(1 << 12)
            stream.seek(-min(len(end), path.stat().st_size), os.SEEK_END)
            return start.match(head) is not None and stream.read() == end

    return is_own


def own_folder(
    command: str,
    own: Callable[[Path], Collection[str]] | None = None,
    old: re.Pattern[str] = NO_NAME,
) -> OutputCheck:
    """Return a check that a folder holds only files written by ``command``.

    Args:
        command: as in the stamp.
        own: returns the names of the command's files in a folder; by default those in the stamp.
        old: names of files whose temporary folders of earlier versions are accepted too.
    """

    def check(path: Path) -> str | None:
        own_names = stamped_files(path, command) if own is None else own(path)
        other = next((name for name in entries(path, old) if name not in own_names), None)
        return (
            None
            if other is None
            else _("holds {other}, not written by {command}", other=other, command=command)
        )

    return check


def stamp(folder: Path, command: str, files: Iterable[str] = ()) -> None:
    """Write the stamp of a folder: its command, and the files written by it."""
    text = json.dumps({"writer": f"cn-clip {command}", "files": sorted(files)}, ensure_ascii=False)
    with atomic_file(folder / STAMP) as path:
        path.write_text(text + "\n", encoding="utf-8", errors="surrogatepass")


def stamped_files(folder: Path, command: str) -> Collection[str]:
    """Return the names of the files that a folder's stamp lists, and of the stamp; none without a
    stamp of this command."""
    values = json_object_at(folder / STAMP)
    files = values.get("files")
    if values.get("writer") != f"cn-clip {command}" or not isinstance(files, list):
        return ()
    return {STAMP, *(name for name in files if isinstance(name, str))}


def json_object_at(path: Path) -> dict[str, Any]:
    """Read a JSON object from a small file; empty if the file is missing or invalid."""
    try:
        if path.is_symlink() or not path.is_file():
            return {}
        values = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def entries(folder: Path, old: re.Pattern[str] = NO_NAME, above: str = "") -> Iterator[str]:
    """Yield the relative names of files, links and empty folders in a folder, in order.

    Temporary folders and the empty lock file are skipped.
    """
    try:
        listing = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UsageError(
            _(
                "{folder} cannot be read: {reason}; give another place",
                folder=folder,
                reason=error.strerror,
            )
        ) from None
    for entry in listing:
        path = Path(entry.path)
        if is_leftover(path, old) or (entry.name == LOCK and _is_empty(path)):
            continue
        inside = None
        if entry.is_dir(follow_symlinks=False):
            inside = entries(path, old, f"{above}{entry.name}/")
        first = None if inside is None else next(inside, None)
        if inside is None or first is None:
            yield f"{above}{entry.name}"
        else:
            yield first
            yield from inside


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files from a folder, and subfolders that become empty."""
    above = set()
    for name in names:
        (folder / name).unlink(missing_ok=True)
        above |= {parent for parent in Path(name).parents if parent.name}
    for parent in sorted(above, key=lambda parent: len(parent.parts), reverse=True):
        if not any((folder / parent).iterdir()):
            (folder / parent).rmdir()


def same_file(one: Path, other: Path) -> bool:
    """Return whether two resolved paths are one file, whatever case, mounts and hard links."""
    identity = device_inode(one)
    return one == other or (identity is not None and identity == device_inode(other))


def is_within(inner: Path, outer: Path) -> bool:
    """Return whether a resolved path is ``outer`` or inside of it."""
    identity = device_inode(outer)
    return identity is not None and any(
        device_inode(path) == identity for path in (inner, *inner.parents)
    )


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str],
    command: str,
    *,
    check: OutputCheck | None = None,
    also: Collection[str] = (),
) -> Iterator[Path]:
    """Yield a temporary folder to write into; on success it is stamped and replaces ``path``.

    The old folder stays until the new one is complete.

    Args:
        path: a new or empty folder, or one that the command wrote.
        command: for the stamp.
        check: of an existing folder; by default ``own_folder(command)``.
        also: names of files that readers of the folder create in it.

    Raises:
        NotADirectoryError: ``path`` is a file.
        UsageError: the folder holds files that the command did not write.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(_("{path} is a file; give a new folder", path=path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(target) as work:
        new, old = work / "new", work / "old"
        new.mkdir()
        yield new
        stamp(new, command, {*entries(new), *also})
        flush(new)
        # Again: files may have been added since the claim.
        reason = (check or own_folder(command))(target) if target.exists() else None
        if reason is not None:
            raise UsageError(_("{path} {reason}; give another place", path=path, reason=reason))
        try:
            if target.exists():
                target.rename(old)
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise


def _check_path(target: Path, given: str, kind: str, in_place: bool) -> None:
    """Refuse a path that is not writable, or of another kind."""
    try:
        status = os.stat(given)  # /dev/stdout may be a pipe, whose target is no file
    except FileNotFoundError:
        status = None
    except OSError as error:  # a parent that is a file, a long name, a loop of links
        raise _unwritable(given, error.strerror) from None
    if status is not None:
        if kind == "file" and stat.S_ISDIR(status.st_mode):
            raise UsageError(_("{given} is a folder; give a file", given=given))
        if kind == "file" and not stat.S_ISREG(status.st_mode):
            raise UsageError(_("{given} is a device, a pipe or a socket; give a file", given=given))
        if kind == "folder" and not stat.S_ISDIR(status.st_mode):
            raise UsageError(_("{given} is a file; give a folder", given=given))
    parent = target if status is not None and in_place else target.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    new_names = target.relative_to(parent).parts
    if any(len(os.fsencode(name)) > _NAME_MAX for name in new_names):
        raise _unwritable(given, _("a name is too long"))
    if not parent.is_dir():
        raise _unwritable(given, _("{parent} is a file", parent=parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _unwritable(given, _("{parent} is not writable", parent=parent))


def _unwritable(given: str, reason: str | None) -> UsageError:
    return UsageError(
        _(
            "could not write {given}: {reason}; nothing was changed. Give another place",
            given=given,
            reason=reason,
        )
    )


def _resolved(path: str | os.PathLike[str]) -> Path | None:
    """Resolve the path of an input; None if it does not exist."""
    try:
        resolved = Path(os.path.realpath(Path(path).expanduser()))
        return resolved if resolved.exists() else None
    except (OSError, ValueError, RuntimeError):  # a NUL, a loop of links, an unknown home folder
        return None


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == 0

"""Outputs: what a command may replace, and files that appear whole or not at all.

The rule for every command that writes: it replaces only what it wrote itself, and only when
``--overwrite`` says so (a command without that option replaces its former output). It never touches
an input, nor a folder that holds anything else, and writes nothing inside an input folder.
``claim`` checks this before anything is computed.

Folders are recognised by a stamp, ``.cn-clip.json``, which names the command and the files; single
files by how they begin. What is half written lies in ``.NAME.XXXXXXXX.cn-clip-tmp`` beside its
place, which is nobody's data.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from cn_clip.errors import CNClipError, UsageError

STAMP = ".cn-clip.json"
LOCK = ".lock"
_TEMPORARY = ".cn-clip-tmp"
_SHOWN_NAME = 40  # bytes of a target's name in that of its temporary folder: names have a limit
_NAME_MAX = 255  # bytes of a file's name on common file systems
_NONE = re.compile("$^")  # matches no name

Objection = Callable[[Path], str | None]
"""Says why what is at a path must not be replaced; None if the command wrote all of it."""


def claim(
    out: str | os.PathLike[str],
    objection: Objection,
    *,
    kind: Literal["file", "folder"] = "file",
    option: str = "--out",
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool | None = None,
    in_place: bool = False,
    old: re.Pattern[str] = _NONE,
) -> Path:
    """Check that an output may be written; nothing is touched. Return it as a path.

    Args:
        out: as the user gave it.
        objection: of what is there, from ``file_by`` or ``folder_by``.
        kind: what is to be written.
        option: the option's name, for messages.
        inputs: files and folders that are read; those that do not exist are passed over.
        overwrite: whether to replace a former output; None if the command always does.
        in_place: the files of a folder are written one by one, so that the folder itself stays.
        old: as of ``folder_by``.

    Raises:
        UsageError: it exists, is an input, lies in one or holds one, is not the command's own, or
            cannot be written.
    """
    given = os.fspath(out)
    if not given or "\0" in given:
        raise UsageError(f"{option} is {given!r}; name a {kind}")
    try:
        target = Path(os.path.realpath(given))  # a link is written through, and stays
    except OSError as error:  # the current folder is gone
        raise _unwritable(given, error.strerror) from None
    _check_place(target, given, kind, in_place)
    taken = target.is_file() if kind == "file" else next(entries(target, old), None) is not None
    if taken and overwrite is False:
        what = "exists" if kind == "file" else "is not empty"
        raise UsageError(f"{given} {what}; give another place, or --overwrite to replace it")
    for each in inputs:
        source = _resolved(each)
        if source is None:
            continue  # who reads it says so
        if same(target, source):
            raise UsageError(f"{given} is both input and output; give another place for the output")
        if source.is_dir() and within(target, source):
            raise UsageError(f"{given} lies in the input {each}; give a place outside of it")
        if within(source, target):
            raise UsageError(f"{given} holds the input {each}; give another place for the output")
    here = _resolved(".")
    if kind == "folder" and not in_place and here is not None and within(here, target):
        raise UsageError(f"{given} is the current folder or holds it; name a folder of its own")
    reason = objection(target) if taken else None
    if reason is not None:
        raise UsageError(f"{given} {reason}; give another place")
    return Path(given)


def file_by(command: str, recognised: Callable[[Path], bool]) -> Objection:
    """Return the objection to a file that a command does not recognise as written by itself.

    An empty file, as ``mktemp`` makes it, may be replaced: nothing is lost.
    """

    def objection(path: Path) -> str | None:
        try:
            if not path.stat().st_size or recognised(path):
                return None
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return f"was not written by `cn-clip {command}`"

    return objection


def begins(*starts: bytes) -> Callable[[Path], bool]:
    """Return what tells whether a file begins with one of some bytes."""

    def recognised(path: Path) -> bool:
        with path.open("rb") as stream:
            return stream.read(max(map(len, starts))).startswith(starts)

    return recognised


def folder_by(
    command: str,
    own: Callable[[Path], Collection[str]] | None = None,
    old: re.Pattern[str] = _NONE,
) -> Objection:
    """Return the objection to a folder that holds anything that a command did not write.

    Args:
        command: the command, as its stamp names it.
        own: returns the names of its files within a folder; by default those of the stamp.
        old: names of files whose temporary folders of earlier versions are known too.
    """

    def objection(path: Path) -> str | None:
        known = stamped(path, command) if own is None else own(path)
        other = next((name for name in entries(path, old) if name not in known), None)
        return None if other is None else f"holds {other}, which no {command} wrote"

    return objection


def stamp(folder: Path, command: str, files: Iterable[str] = ()) -> None:
    """Write into a folder which command's it is, and the files that the command wrote."""
    text = json.dumps({"writer": f"cn-clip {command}", "files": sorted(files)}, ensure_ascii=False)
    with published(folder / STAMP) as path:
        path.write_text(text + "\n", encoding="utf-8", errors="surrogatepass")


def stamped(folder: Path, command: str) -> Collection[str]:
    """Return the names of the files in a folder that its stamp says a command wrote, the stamp
    among them; none if it has no stamp of this command."""
    values = json_object_at(folder / STAMP)
    files = values.get("files")
    if values.get("writer") != f"cn-clip {command}" or not isinstance(files, list):
        return ()
    return {STAMP, *(each for each in files if isinstance(each, str))}


def json_object_at(path: Path) -> dict[str, Any]:
    """Return the JSON object of a small file; an empty one if there is none that can be read."""
    try:
        if path.is_symlink() or not path.is_file():
            return {}
        values = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def entries(folder: Path, old: re.Pattern[str] = _NONE, above: str = "") -> Iterator[str]:
    """Yield the names, within a folder, of files, links and empty folders, in order.

    Left out are what a killed process left half written, and the empty lock file.
    """
    try:
        found = sorted(os.scandir(folder), key=lambda each: each.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:  # nobody knows what is in it
        raise UsageError(f"{folder} cannot be read: {error.strerror}; give another place") from None
    for each in found:
        if is_leftover(Path(each.path), old) or (each.name == LOCK and _is_empty(Path(each.path))):
            continue
        inside = None
        if each.is_dir(follow_symlinks=False):
            inside = entries(Path(each.path), old, f"{above}{each.name}/")
        first = None if inside is None else next(inside, None)
        if inside is None or first is None:
            yield f"{above}{each.name}"
        else:
            yield first
            yield from inside


def is_leftover(path: Path, old: re.Pattern[str] = _NONE) -> bool:
    """Tell whether a path is a temporary folder of ours.

    Earlier versions named them ``.NAME.XXXXXXXX``: those count if NAME matches ``old``, and they
    hold nothing but that file.
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


def sweep(folder: Path, old: re.Pattern[str] = _NONE) -> None:
    """Remove what killed processes left half written in a folder that no other process writes."""
    for path in [*folder.iterdir()] if folder.is_dir() else []:
        if is_leftover(path, old) and not (path / "old").exists():  # which may be the only copy
            shutil.rmtree(path, ignore_errors=True)


def sweep_beside(path: str | os.PathLike[str]) -> None:
    """Remove what killed processes left half written of one file, which no other process writes."""
    target = Path(os.path.realpath(path))
    if len(os.fsencode(target.name)) > _SHOWN_NAME or not target.parent.is_dir():
        return  # it might be another's, of a name that begins alike
    ending = re.compile(re.escape(_prefix(target)) + r"[a-z0-9_]{8}" + re.escape(_TEMPORARY))
    for other in target.parent.iterdir():
        if ending.fullmatch(other.name) and is_leftover(other) and not (other / "old").exists():
            shutil.rmtree(other, ignore_errors=True)


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files from a folder, and the folders within it that are empty then."""
    above = set()
    for name in names:
        (folder / name).unlink(missing_ok=True)
        above |= {parent for parent in Path(name).parents if parent.name}
    for parent in sorted(above, key=lambda each: len(each.parts), reverse=True):
        if not any((folder / parent).iterdir()):
            (folder / parent).rmdir()


def same(one: Path, other: Path) -> bool:
    """Tell whether two resolved paths are one, also where case, mounts or hard links differ."""
    return one == other or (_identity(one) is not None and _identity(one) == _identity(other))


def within(inner: Path, outer: Path) -> bool:
    """Tell whether a resolved path is another, or lies in it."""
    mark = _identity(outer)
    return mark is not None and any(_identity(each) == mark for each in (inner, *inner.parents))


@contextmanager
def published(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write a file at; on success it replaces ``path`` in one step.

    On any error, Ctrl-C included, the temporary file is removed and ``path`` is as it was.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = _temporary_beside(target)  # whatever the writer creates in it goes with it
    try:
        temporary = folder / target.name
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def published_folder(
    path: str | os.PathLike[str],
    command: str,
    *,
    objection: Objection | None = None,
    also: Collection[str] = (),
) -> Iterator[Path]:
    """Yield a temporary folder to write into; on success it takes the place of ``path``, stamped.

    The old folder stays until the new one is complete.

    Args:
        path: new, empty, or a folder that the command wrote before.
        command: the command, for the stamp.
        objection: to what is there; by default to all without the command's stamp.
        also: names of files that readers of the folder make in it.

    Raises:
        NotADirectoryError: there is a file at ``path``.
        UsageError: it holds something that the command did not write.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{path} is a file; give a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = _temporary_beside(target)
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        yield new
        stamp(new, command, {*entries(new), *also})
        flush(new)
        # Once more: since the claim somebody may have put a file there.
        reason = (objection or folder_by(command))(target) if target.exists() else None
        if reason is not None:
            raise UsageError(f"{path} {reason}; give another place")
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


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        CNClipError: it cannot be written; what was there stays.
    """
    with unwritable_named(path), published(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def unwritable_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what fails while an output is written into one sentence."""
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
    """Bring a file, or all in a folder, to the disk, with the permissions new files get here.

    Whoever publishes does this last; done earlier, beside other work, it is quick then.
    """
    mode = _mode_of_new_files(path.parent)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(mode)  # some writers leave 0600
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())


def _mode_of_new_files(folder: Path) -> int:
    """Return the permissions of a file made in a folder: umask can be read by setting it only,
    which other threads would feel."""
    probe = folder / f".{secrets.token_hex(8)}"
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()


def _temporary_beside(target: Path) -> Path:
    return Path(tempfile.mkdtemp(_TEMPORARY, _prefix(target), target.parent))


def _prefix(target: Path) -> str:
    name = target.name
    while len(os.fsencode(name)) > _SHOWN_NAME:
        name = name[:-1]
    return f".{name}."


def _check_place(target: Path, given: str, kind: str, in_place: bool) -> None:
    """Refuse a place that cannot be written, or holds a thing of another kind."""
    try:
        found = os.stat(given)  # not the target: that of a pipe, /dev/stdout say, is no file
    except FileNotFoundError:
        found = None
    except OSError as error:  # its parent is a file, its name is too long, its links are a loop
        raise _unwritable(given, error.strerror) from None
    if found is not None:
        if kind == "file" and stat.S_ISDIR(found.st_mode):
            raise UsageError(f"{given} is a folder; name a file")
        if kind == "file" and not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{given} is a device, a pipe or a socket; name a file")
        if kind == "folder" and not stat.S_ISDIR(found.st_mode):
            raise UsageError(f"{given} is a file; name a folder")
    place = target if found is not None and in_place else target.parent
    while not os.path.lexists(place):
        place = place.parent
    made = target.relative_to(place).parts
    if any(len(os.fsencode(name)) > _NAME_MAX for name in made):
        raise _unwritable(given, "a name is too long")
    if not place.is_dir():
        raise _unwritable(given, f"{place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise _unwritable(given, f"{place} is not writable")


def _unwritable(given: str, reason: str | None) -> UsageError:
    return UsageError(f"could not write {given}: {reason}; nothing was changed. Give another place")


def _resolved(path: str | os.PathLike[str]) -> Path | None:
    """Return an input's path without links; None if there is nothing."""
    try:
        resolved = Path(os.path.realpath(Path(path).expanduser()))
        return resolved if resolved.exists() else None
    except (OSError, ValueError, RuntimeError):  # a NUL, a loop of links, a home that is not known
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == 0

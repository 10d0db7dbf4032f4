"""Paths that people give, and what lies there: read within limits, searched without loops."""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cn_clip.errors import UsageError
from cn_clip.text import path_text

MAX_FILE = 1 << 30  # bytes of one file that is read whole; an image of this size is none
MAX_TEXT = 1 << 26  # bytes of a text file that is read whole, or of one line or record

# Files that belong beside images and are passed over without a word.
_BESIDE = frozenset((
    ".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".md", ".rst",
    ".xml", ".html", ".yaml", ".yml", ".toml", ".ini", ".log", ".db", ".pkl", ".npy", ".npz", ".pt",
    ".pth", ".safetensors", ".py", ".ipynb", ".sh", ".mat", ".tar", ".zip", ".gz", ".pdf",
))  # fmt: skip
_NAMES_BESIDE = ("readme", "license", "licence", "copying", "notice", "authors", "makefile")


# What is given for another file, by its first bytes, and what to do with it.
_MISTAKEN = {
    b"\x1f\x8b": "compressed with gzip: gunzip it first",
    b"BZh": "compressed with bzip2: bunzip2 it first",
    b"\xfd7zXZ\0": "compressed with xz: unxz it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unzstd it first",
    b"PK\x03\x04": "a zip file: unzip it first",
    b"version https://git-lfs": "a pointer of Git LFS, not the file: run git lfs pull first",
}


def as_path(given: str | os.PathLike[str]) -> Path:
    """Return a path that was given by a person, with ``~`` expanded; it need not exist.

    Raises:
        UsageError: it is empty, as an unset shell variable is, or no system takes it.
    """
    text = os.fspath(given)
    if not text:
        raise UsageError("an empty path was given; is a shell variable unset? give . for here")
    try:
        path = Path(text).expanduser()
        path.exists()  # refuses a name that is too long
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path_text(text)!r} is no usable path: {reason}") from None
    if "\0" in text:
        raise UsageError(f"{text!r} is no usable path: it holds a NUL character")
    return path


def beside(root: Path, given: str) -> Path:
    """Return the path ``given`` within ``root``; one with ``\\``, written on Windows, is read with
    ``/`` if only that exists."""
    path = root / given
    if "\\" in given and os.sep == "/" and not os.path.lexists(path):
        slashed = root / given.replace("\\", "/")
        return slashed if os.path.lexists(slashed) else path
    return path


def read_file(path: str | os.PathLike[str], limit: int = MAX_FILE) -> bytes:
    """Read a plain file whole.

    Raises:
        OSError: there is none, or it is a folder, a named pipe, a device or a socket, or larger
            than ``limit`` bytes; ``strerror`` says which. Never waits for a pipe.
    """
    name = os.fspath(path)
    if "\0" in name:
        raise OSError(errno.EINVAL, "its path holds a NUL character", name)
    check_plain(name)  # before it is opened: to open some devices does something
    # Not blocking, in case a pipe has taken its place since.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(name, flags), "rb") as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, f"it is {_kind(found.st_mode)}, not a plain file", name)
        if found.st_size > limit:
            raise OSError(
                errno.EFBIG, f"it has {found.st_size:,} bytes, above the limit of {limit:,}", name
            )
        # Not read(limit), which reserves as much. Files in /proc say that they are empty.
        content = stream.read(found.st_size + 1)
        while len(content) <= limit and (more := stream.read(1 << 16)):
            content += more
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", name)
    return content


def check_plain(path: str | os.PathLike[str]) -> None:
    """Raise the OSError of ``read_file`` if a path is of anything but a plain file."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, f"it is {_kind(mode)}, not a plain file", os.fspath(path))


def mistaken(head: bytes) -> str | None:
    """Say what a file is by its first 32 bytes, if it is compressed or a pointer to another one."""
    return next((what for start, what in _MISTAKEN.items() if head.startswith(start)), None)


def read_lines(path: str | os.PathLike[str], limit: int = MAX_TEXT) -> list[str]:
    """Read the lines of a small UTF-8 text file, without their ends.

    Raises:
        OSError: as ``read_file``.
        UnicodeDecodeError: it is not UTF-8.
    """
    return lines_of(read_file(path, limit))


def lines_of(raw: bytes) -> list[str]:
    """Return the lines of UTF-8 text, without their ends and a byte order mark."""
    # Not str.splitlines(), which ends lines at U+2028 and other characters that texts hold.
    lines = re.split(r"\r\n|\r|\n", raw.decode("utf-8-sig"))
    return lines if lines[-1] else lines[:-1]


@dataclass(slots=True)
class Listing:
    """What a folder holds: its files, in sorted order, and a sentence for each of its folders that
    cannot be listed."""

    files: list[Path] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)


def walk(root: Path) -> Listing:
    """List a folder with all that is in it. Linked folders are searched too, each real folder once,
    under its real name if it has one in here; a link back to a folder above is not followed."""
    found = Listing()
    for _, inside in _folders(root, found.closed):
        found.files += [Path(each.path) for each in inside if not _is_dir(each)]
    found.files.sort()
    return found


def find(pattern: str) -> list[Path]:
    """Return what a pattern matches, sorted: ``*``, ``?``, ``[...]``, and ``**`` for any folders,
    each real one once. As in a shell, a name that starts with a dot is matched by one only."""
    whole = Path(pattern)
    found = [Path(whole.anchor)]
    parts = whole.parts[1 if whole.anchor else 0 :]
    for at, part in enumerate(parts, 1):
        if part == "**":
            below = [
                each for base in found if base.is_dir() for each in _folders(base, [], hidden=False)
            ]
            found = [folder for folder, _ in below]
            if at == len(parts):
                found += [Path(each.path) for _, inside in below for each in inside]
        elif re.search(r"[*?[]", part):
            found = [each for base in found for each in _matching(base, part)]
        else:
            found = [each for base in found if os.path.lexists(each := base / part)]
        found = list(dict.fromkeys(found))
    return sorted(found)


def _folders(
    root: Path, closed: list[str], *, hidden: bool = True
) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """Yield a folder and all below it with what they hold, each once, linked ones after others."""
    seen = {_identity(each) for each in Path(os.path.realpath(root)).parents}
    real, linked = [root], list[Path]()
    while real or linked:
        folder = real.pop() if real else linked.pop(0)
        identity = _identity(folder)
        if identity is None or identity in seen:
            continue
        seen.add(identity)
        inside = [
            each for each in _entries(folder, closed) if hidden or not each.name.startswith(".")
        ]
        yield folder, inside
        below = [each for each in inside if _is_dir(each)]
        real += [Path(each.path) for each in reversed(below) if not each.is_symlink()]
        linked += [Path(each.path) for each in below if each.is_symlink()]


def passed_over(files: Iterable[Path], suffixes: Iterable[str], where: object) -> str | None:
    """Say how many files of a folder are of no known image format, and of which suffixes.

    None if there are none; hidden files and those that belong beside images are not counted.
    """
    known = {*suffixes, *_BESIDE}
    counts: dict[str, int] = {}
    for file in files:
        name, suffix = file.name.lower(), file.suffix.lower()
        if suffix not in known and not name.startswith(".") and name not in _NAMES_BESIDE:
            counts[suffix] = counts.get(suffix, 0) + 1
    if not counts:
        return None
    most = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    named = ", ".join(
        f"{count:,} {path_text(suffix) or 'without a suffix'}" for suffix, count in most[:6]
    )
    more = f", and {len(most) - 6} other suffixes" if len(most) > 6 else ""
    total = sum(counts.values())
    what = "1 file is" if total == 1 else f"{total:,} files are"
    return (
        f"{path_text(str(where))}: {what} passed over, of no image format that is read ({named}"
        f"{more}); convert images among them to JPEG or PNG"
    )


def _entries(folder: Path, closed: list[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        closed.append(f"the folder {path_text(folder)} cannot be listed: {error.strerror}")
        return []


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say
        return False


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _matching(folder: Path, part: str) -> list[Path]:
    match = re.compile(fnmatch.translate(part)).match
    return [
        folder / each.name
        for each in _entries(folder, [])
        # A name that has such characters itself means that one, too.
        if each.name == part
        or (match(each.name) and (part.startswith(".") or not each.name.startswith(".")))
    ]


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")

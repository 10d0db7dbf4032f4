"""Paths from users: files read within limits, folders searched without loops."""

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
from cn_clip.translation import N_, _, _n, translate

MAX_FILE = 1 << 30  # bytes of a file read into memory
MAX_TEXT = 1 << 26  # bytes of a text file read into memory, or of one line or record

# Files that are common next to images, and skipped without a warning.
_OTHER_SUFFIXES = frozenset((
    ".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".md", ".rst",
    ".xml", ".html", ".yaml", ".yml", ".toml", ".ini", ".log", ".db", ".pkl", ".npy", ".npz", ".pt",
    ".pth", ".safetensors", ".py", ".ipynb", ".sh", ".mat", ".tar", ".zip", ".gz", ".pdf",
))  # fmt: skip
_APPLE_DOUBLE = "._* (metadata of macOS)"
_OTHER_NAMES = ("readme", "license", "licence", "copying", "notice", "authors", "makefile")


# The start of files that are given as another format, white space aside -> description and remedy.
HEAD = 512  # bytes to read for ``wrong_format``
_OFFICE = N_("a spreadsheet or another office document; save it as CSV (UTF-8) first")
_WEB_PAGE = N_("a web page, not the file; on Hugging Face use the /resolve/ URL")
_WRONG_FORMATS = tuple(
    (re.compile(start, re.DOTALL), description)
    for start, description in (
        (rb"version https://git-lfs", N_("a Git LFS pointer; fetch the file: git lfs pull")),
        (rb"\x1f\x8b", N_("compressed with gzip: gunzip it first")),
        (rb"BZh\d", N_("compressed with bzip2: bunzip2 it first")),
        (rb"\xfd7zXZ\0", N_("compressed with xz: unxz it first")),
        (rb"\x28\xb5\x2f\xfd", N_("compressed with zstd: unzstd it first")),
        (rb"7z\xbc\xaf\x27\x1c", N_("compressed with 7-Zip: unpack it first")),
        (rb"Rar!\x1a\x07", N_("compressed with RAR: unpack it first")),
        (rb"PK\x03\x04.{26}(?:\[Content_Types\]|_rels/|xl/|docProps/|mimetypeapp)", _OFFICE),
        (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _OFFICE),
        (rb"PK\x03\x04", N_("a zip file: unzip it first")),
        (rb"(?i:<!doctype html|<html)", _WEB_PAGE),
        (rb"<\?xml", N_("an XML page, as of a server's error, not the file; download it again")),
        (rb"GGUF[\x01-\x0f]\0\0\0", N_("a GGUF file of llama.cpp; give the original weights")),
        (rb"\x89HDF\r\n\x1a\n", N_("an HDF5 file, as of Keras; convert it")),
        (rb"\x93NUMPY", N_("a NumPy array; convert it")),
    )
)


def as_path(given: str | os.PathLike[str]) -> Path:
    """Return a path from a user, with ``~`` expanded; it need not exist.

    Raises:
        UsageError: the path is empty (an unset shell variable), or invalid.
    """
    text = os.fspath(given)
    if not text:
        raise UsageError(_("the path is empty; is a shell variable unset? Give . for this folder"))
    try:
        path = Path(text).expanduser()
        path.exists()  # raises if a name is too long
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            _("{text!r} is not a valid path: {reason}", text=path_text(text), reason=reason)
        ) from None
    if "\0" in text:
        raise UsageError(_("{text!r} is not a valid path: it holds a NUL character", text=text))
    return path


def variable_folder(variable: str, default: str) -> Path:
    """Return the folder that an environment variable names, else the default, with ``~`` expanded.
    It may not exist.

    Raises:
        UsageError: the home folder is unknown.
    """
    given = os.environ.get(variable) or default
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise UsageError(
            _(
                "the home folder of {path} is unknown; set {variable} to a folder",
                path=given,
                variable=variable,
            )
        ) from None


def resolve_in(root: Path, name: str) -> Path:
    """Return ``root / name``, with ``\\`` of a Windows path replaced if only that file exists."""
    path = root / name
    if "\\" in name and os.sep == "/" and not os.path.lexists(path):
        posix = root / name.replace("\\", "/")
        return posix if os.path.lexists(posix) else path
    return path


def read_file(path: str | os.PathLike[str], limit: int = MAX_FILE) -> bytes:
    """Return the bytes of a regular file; never blocks on a pipe.

    Raises:
        OSError: the file is missing, not a regular file, or larger than ``limit`` bytes;
            ``strerror`` has the reason.
    """
    name = os.fspath(path)
    if "\0" in name:
        raise OSError(errno.EINVAL, _("its path holds a NUL character"), name)
    check_regular(name)  # before opening: opening a device may have effects
    # O_NONBLOCK: the file may have been replaced by a pipe since.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(name, flags), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(
                errno.EINVAL,
                _("it is {file_type}, not a regular file", file_type=_file_type(status.st_mode)),
                name,
            )
        if status.st_size > limit:
            raise OSError(
                errno.EFBIG,
                _(
                    "it has {st_size:,} bytes, above the limit of {limit:,}",
                    st_size=status.st_size,
                    limit=limit,
                ),
                name,
            )
        # Not read(limit), which allocates as much. Files in /proc have a size of 0.
        content = stream.read(status.st_size + 1)
        while len(content) <= limit and (more := stream.read(1 << 16)):
            content += more
    if len(content) > limit:
        raise OSError(errno.EFBIG, _("it has more than {limit:,} bytes", limit=limit), name)
    return content


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise the OSError of ``read_file`` if a path is not a regular file."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(
            code,
            _("it is {file_type}, not a regular file", file_type=_file_type(mode)),
            os.fspath(path),
        )


def wrong_format(head: bytes) -> str | None:
    """Describe a compressed file, an office document, a Git LFS pointer or another file that is
    none of pairs or weights, by its first ``HEAD`` bytes; None for others."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    text = next((text for pattern, text in _WRONG_FORMATS if pattern.match(start)), None)
    return None if text is None else translate(text)


def read_lines(path: str | os.PathLike[str], limit: int = MAX_TEXT) -> list[str]:
    """Read the lines of a small UTF-8 text file, without line ends.

    Raises:
        OSError: as ``read_file``.
        UnicodeDecodeError: the file is not UTF-8.
    """
    return lines_of(read_file(path, limit))


def lines_of(raw: bytes) -> list[str]:
    """Split UTF-8 text into lines, without line ends and byte order mark."""
    # Not str.splitlines(), which also splits at U+2028 and other characters in texts.
    lines = re.split(r"\r\n|\r|\n", raw.decode("utf-8-sig"))
    return lines if lines[-1] else lines[:-1]


@dataclass(slots=True)
class Listing:
    """The files of a folder, sorted, and a message for each unreadable folder in it."""

    files: list[Path] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def walk(root: Path) -> Listing:
    """List all files in a folder, recursively. Links to folders are followed, except to parent
    folders; every real folder is listed once, under its real path if it is inside ``root``.

    Raises:
        UsageError: the folder is the root of the file system, whose listing takes minutes.
    """
    if os.path.realpath(root) == os.path.abspath(os.sep):
        raise UsageError(_("{folder} is the whole file system; name a folder in it", folder=root))
    listing = Listing()
    for _unused, entries in walk_folders(root, listing.unreadable):
        listing.files += [Path(entry.path) for entry in entries if not is_folder(entry)]
    listing.files.sort()
    return listing


def find(pattern: str) -> list[Path]:
    """Return the matches of a glob, sorted: ``*``, ``?``, ``[...]``, and ``**`` for any folders,
    every real folder once. As in a shell, only a leading dot matches a leading dot."""
    glob = Path(pattern)
    matches = [Path(glob.anchor)]
    parts = glob.parts[1 if glob.anchor else 0 :]
    for at, part in enumerate(parts, 1):
        if part == "**":
            below = [
                walked
                for base in matches
                if base.is_dir()
                for walked in walk_folders(base, [], hidden=False)
            ]
            matches = [folder for folder, _ in below]
            if at == len(parts):
                matches += [Path(entry.path) for _, entries in below for entry in entries]
        elif re.search(r"[*?[]", part):
            matches = [match for base in matches for match in _glob_entries(base, part)]
        else:
            matches = [path for base in matches if os.path.lexists(path := base / part)]
        matches = list(dict.fromkeys(matches))
    return sorted(matches)


def walk_folders(
    root: Path, unreadable: list[str], *, hidden: bool = True
) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """Yield (folder, entries) for a folder and all below it, each once, real ones before links."""
    seen = {device_inode(parent) for parent in Path(os.path.realpath(root)).parents}
    real, linked = [root], list[Path]()
    while real or linked:
        folder = real.pop() if real else linked.pop(0)
        identity = device_inode(folder)
        if identity is None or identity in seen:
            continue
        seen.add(identity)
        entries = [
            entry
            for entry in _list_folder(folder, unreadable)
            if hidden or not entry.name.startswith(".")
        ]
        yield folder, entries
        below = [entry for entry in entries if is_folder(entry)]
        real += [Path(entry.path) for entry in reversed(below) if not entry.is_symlink()]
        linked += [Path(entry.path) for entry in below if entry.is_symlink()]


def is_apple_double(file: Path) -> bool:
    """Return whether a file is ``._cat.jpg``, where macOS keeps metadata of ``cat.jpg``."""
    return file.name.startswith("._")


def of_suffixes(files: Iterable[Path], suffixes: Iterable[str]) -> list[Path]:
    """Return the files that have one of the suffixes, without metadata of macOS."""
    known = set(suffixes)
    return [file for file in files if file.suffix.lower() in known and not is_apple_double(file)]


def skipped_files(files: Iterable[Path], suffixes: Iterable[str], where: object) -> str | None:
    """Return a warning that counts the files not in ``of_suffixes`` by suffix; None without any.

    Hidden files and files that are common next to images are not counted.
    """
    wanted = set(suffixes)
    known = wanted | _OTHER_SUFFIXES
    counts: dict[str, int] = {}
    for file in files:
        name, suffix = file.name.lower(), file.suffix.lower()
        if is_apple_double(file) and suffix in wanted:
            counts[_APPLE_DOUBLE] = counts.get(_APPLE_DOUBLE, 0) + 1
        elif suffix not in known and not name.startswith(".") and name not in _OTHER_NAMES:
            counts[suffix] = counts.get(suffix, 0) + 1
    if not counts:
        return None
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    no_suffix = _("without a suffix")
    listed = ", ".join(
        f"{count:,} {path_text(suffix) or no_suffix}" for suffix, count in ordered[:6]
    )
    more = _(", and {count} other suffixes", count=len(ordered) - 6) if len(ordered) > 6 else ""
    total = sum(counts.values())
    return _n(
        "{where}: {count:,} file is skipped, not of a supported image format ({suffixes}); "
        "convert images among them to JPEG or PNG",
        "{where}: {count:,} files are skipped, not of a supported image format ({suffixes}); "
        "convert images among them to JPEG or PNG",
        total,
        where=path_text(str(where)),
        suffixes=listed + more,
    )


def _list_folder(folder: Path, unreadable: list[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        unreadable.append(
            _(
                "the folder {folder} cannot be listed: {reason}",
                folder=path_text(folder),
                reason=error.strerror,
            )
        )
        return []


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def device_inode(path: Path) -> tuple[int, int] | None:
    """Return what identifies a file or folder, whatever its case, mounts and hard links; None if
    it cannot be read."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _glob_entries(folder: Path, part: str) -> list[Path]:
    match = re.compile(fnmatch.translate(part)).match
    return [
        folder / entry.name
        for entry in _list_folder(folder, [])
        # A name with glob characters matches itself too.
        if entry.name == part
        or (match(entry.name) and (part.startswith(".") or not entry.name.startswith(".")))
    ]


def _file_type(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: _("a folder"),
        stat.S_IFIFO: _("a named pipe"),
        stat.S_IFSOCK: _("a socket"),
        stat.S_IFCHR: _("a device"),
        stat.S_IFBLK: _("a device"),
    }
    return kinds.get(stat.S_IFMT(mode), _("something else"))

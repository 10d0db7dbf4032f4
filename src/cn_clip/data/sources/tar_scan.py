"""The members of a tar shard, from its headers alone.

``tarfile`` takes most of the time of indexing a shard. ``_plain_members`` reads the headers that
training shards consist of: regular files and folders with short names, and extended headers that
hold times and owners only. At any other header, valid or damaged, ``tarfile`` reads the shard anew.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from cn_clip.data.sources.shard_file import FileState, ShardFile
from cn_clip.errors import DataError
from cn_clip.files import HEAD, MAX_TEXT, wrong_format
from cn_clip.image.limits import MAX_ENCODED
from cn_clip.text import path_text
from cn_clip.translation import _

TEXT_SUFFIXES, JSON_SUFFIXES = (".txt", ".caption"), (".json",)
BLOCK = 512
_BUFFER = 1 << 14
_READ = 8192  # bytes per read: the small members between two images
_CHECKED = 4096  # headers checked at once
_MAX_HEADER = 1 << 16  # bytes of a header; the time of tarfile's parser is quadratic in them
_ZEROS = bytes(BLOCK)
_REGULAR, _FOLDER, _EXTENDED = (48, 0), 53, 120  # types: "0", NUL, "5" and "x"
_CHECKSUM = slice(148, 156)
_NUMBERS = (slice(100, 148), slice(329, 345))  # mode, uid, gid, size, time; device numbers
_FIELDS = ((0, 8), (8, 16), (16, 24), (24, 36), (36, 48), (48, 56), (56, 64))  # in _NUMBERS
_SIMPLE = re.compile(r"[\w-]+(?:/[\w-]+)*\.[A-Za-z0-9]+", re.ASCII)
_HARMLESS = re.compile(rb"(?:(\d+) (?:mtime|atime|ctime|uid|gid|uname|gname)=[^\n]*\n)")


class Member(NamedTuple):
    """A member of an archive; with a ``reason`` it is not read.

    ``at`` is the offset of its content, ``size`` its length, in bytes. A ``simple`` member has its
    whole name in the header right before the content: folders, letters, digits and one dot.
    """

    name: str
    at: int
    size: int
    reason: str | None
    simple: bool


def members(file: ShardFile, state: FileState) -> Iterator[Member]:
    """Yield the members of an archive, but no folders.

    Raises:
        DataError: the archive is damaged, compressed, lacks its end, or cannot be read.
    """
    with file.open(state) as stream:
        if reason := wrong_format(stream.read(HEAD)):
            raise DataError(
                _(
                    "{path} is {reason}; pairs are read from an uncompressed .tar",
                    path=file.name,
                    reason=reason,
                )
            )
        plain = _plain_members(stream, state.size)
    if plain is not None:
        yield from plain
        return
    with buffered(file, state) as stream:
        for member in _tarfile_members(stream, state.size, file.name):
            name = member.name
            yield Member(name, member.offset_data, member.size, _refusal_reason(member), False)


def buffered(file: ShardFile, state: FileState) -> BinaryIO:
    """Open a shard for reading in sequence, in few reads."""
    stream: Any = file.open(state)
    return io.BufferedReader(stream, _BUFFER)


def member_name(header: bytes) -> str:
    """Return the name in a header of 512 bytes, as ``tarfile`` reads it."""
    name, prefix = (field.partition(b"\0")[0] for field in (header[:100], header[345:500]))
    if prefix and header[156:157] not in tarfile.GNU_TYPES:
        name = prefix + b"/" + name
    return name.decode(tarfile.ENCODING, "surrogateescape")


def _plain_members(stream: BinaryIO, size: int) -> list[Member] | None:
    """Return the members but folders, None if any header needs ``tarfile``."""
    found: list[Member] = []
    headers: list[bytes] = []
    simple, small = _SIMPLE.fullmatch, min(MAX_TEXT, MAX_ENCODED)
    chunk, chunk_at, position = b"", 0, 0
    extended = False  # whether the header before was an extended one, which another must follow
    while True:
        at = position - chunk_at
        if at < 0 or at + BLOCK > len(chunk):
            stream.seek(position)
            chunk, chunk_at, at = stream.read(_READ), position, 0
            if len(chunk) < BLOCK:
                return None
        header = chunk[at : at + BLOCK]
        if not header[0] and header == _ZEROS:
            return found if not extended and _all_plain(headers) else None
        try:
            length = int(header[124:136].rstrip(b" \0") or b"0", 8)
        except ValueError:
            return None
        headers.append(header)
        if len(headers) == _CHECKED:
            if not _all_plain(headers):
                return None
            headers.clear()
        kind, content = header[156], position + BLOCK
        position = content + -(-length // BLOCK) * BLOCK
        if length < 0 or content + length > size:
            return None
        extended = kind == _EXTENDED
        if kind in _REGULAR:
            end = header.find(0, 0, 100)
            name = (
                member_name(header)
                if header[345]
                else header[: 100 if end < 0 else end].decode(tarfile.ENCODING, "surrogateescape")
            )
            if simple(name):
                reason = None if length <= small else _excess(name, length)
                found.append(Member(name, content, length, reason, True))
            elif not kind and name.endswith("/"):  # a folder of the oldest format
                return None
            else:
                found.append(Member(name, content, length, _plain_refusal(name, length), False))
        elif extended:
            if length > _MAX_HEADER:
                return None
            stream.seek(content)
            if not _is_harmless(stream.read(length)):
                return None
        elif kind != _FOLDER or length:
            return None


def _is_harmless(records: bytes) -> bool:
    """Return whether an extended header leaves name, size and kind of the member as they are."""
    at = 0
    while at < len(records):
        record = _HARMLESS.match(records, at)
        if record is None or int(record[1]) != record.end() - at:
            return False
        at = record.end()
    return at > 0


def _all_plain(headers: list[bytes]) -> bool:
    """Return whether all headers have the right checksum, and plain octal numbers."""
    if not headers:
        return True
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    stored = blocks[:, _CHECKSUM]
    digits = stored[:, :6].astype(np.int64) - 48
    if not ((digits >= 0) & (digits < 8)).all() or not np.isin(stored[:, 6:], (0, 32)).all():
        return False
    sums = blocks.sum(axis=1, dtype=np.int64) - stored.sum(axis=1, dtype=np.int64) + 8 * 32
    if not np.array_equal(digits @ (8 ** np.arange(5, -1, -1)), sums):
        return False
    return _are_octal(np.concatenate([blocks[:, part] for part in _NUMBERS], axis=1))


def _are_octal(fields: npt.NDArray[np.uint8]) -> bool:
    """Return whether number fields (N, 64) hold octal digits, with blanks around them only."""
    digit = (fields & 0xF8) == 48
    if ((fields != 0) & (fields != 32) & ~digit).any():
        return False
    # The headers of a shard are alike: each pattern of digits is checked once.
    patterns = np.unique(np.packbits(digit, axis=1).view(np.uint64))
    for pattern in np.unpackbits(patterns.view(np.uint8).reshape(-1, 8), axis=1):
        for start, stop in _FIELDS:
            if 0 in bytes(pattern[start:stop]).strip(b"\0"):  # a blank between digits
                return False
    return True


class _BoundedStream:
    """A stream for tarfile that refuses oversized headers and never reads beyond the file."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER:
            raise tarfile.ReadError(_("a header claims {size:,} bytes", size=size))
        return self._stream.read(max(0, min(size, self._size - self._stream.tell())))

    def seek(self, offset: int) -> int:
        return self._stream.seek(min(offset, self._size))


def _tarfile_members(stream: BinaryIO, size: int, path: str) -> Iterator[tarfile.TarInfo]:
    """Yield all members but folders; raise if the archive lacks its end marker."""
    bounded: Any = _BoundedStream(stream, size)
    archive = _map_parse_errors(path, lambda: tarfile.TarFile(fileobj=bounded, errorlevel=2))
    end = 0
    while (member := _map_parse_errors(path, archive.next)) is not None:
        archive.members = []  # otherwise gigabytes of TarInfo
        if member.size < 0:  # tarfile would seek backwards forever
            raise DataError(
                _(
                    "{path}, member {name!r} claims {size} bytes",
                    path=path,
                    name=member.name,
                    size=member.size,
                )
            )
        if member.isdir():
            continue
        end = member.offset_data + member.size
        if member.isreg() and end > size:
            break
        yield member
    stream.seek(-(-end // BLOCK) * BLOCK)
    if size < end + BLOCK or any(stream.read(BLOCK)):
        raise DataError(
            _(
                "{path} ends within {name}: it is still being written, or truncated; wait until "
                "it is written, or write it again",
                path=path,
                name=member.name if member else _("its last member"),
            )
        )


def _map_parse_errors(path: str, read: Callable[[], Any]) -> Any:
    """Run tarfile's parser; on damaged headers it raises many kinds of errors."""
    try:
        return read()
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            _(
                "{path} is not a complete tar file: {error}; write it again",
                path=path,
                error=error or type(error).__name__,
            )
        ) from None


def _refusal_reason(member: tarfile.TarInfo) -> str | None:
    if member.islnk():
        return _(
            "it is a hard link to {target!r}; pack it as a file", target=path_text(member.linkname)
        )
    if not member.isreg() or member.issparse():
        return _("it is a link, a device or sparse, not a regular file")
    return _plain_refusal(member.name, member.size)


def _plain_refusal(name: str, size: int) -> str | None:
    """Return why a regular file is not read, None if it is."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        return _("its path leads outside of the archive")
    if "\n" in name:
        return _("its name has a line break")
    return _excess(name, size)


def _excess(name: str, size: int) -> str | None:
    """Return why a member is too large, None if it is not."""
    limit = MAX_TEXT if name.lower().endswith((*TEXT_SUFFIXES, *JSON_SUFFIXES)) else MAX_ENCODED
    if size > limit:
        return _("it has {size:,} bytes, above the limit of {limit:,}", size=size, limit=limit)
    return None

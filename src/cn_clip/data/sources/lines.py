"""Text files of any size, a line or a CSV record at a time, in any order."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cn_clip.errors import DataError
from cn_clip.files import MAX_TEXT, check_plain, mistaken
from cn_clip.text import path_text, read_json, valid_text

_BLOCK = 16 << 20
_LF, _CR = b"\n", b"\r"
_MOST_LINES = 100  # of one CSV record; a caption of more lines is a quote that was never closed
_MANY_LINES = 10  # as many, each of as many fields as the header, are records in a stray quote


class Lines:
    """The records of a UTF-8 file by number: 12 bytes of memory each, the text stays on disk.

    A record is a line, or with ``delimiter`` a CSV record, whose quoted fields may span lines.
    Empty lines are left out. A byte order mark and line ends of any system are understood. No file
    stays open, so that it can be pickled and forked.
    """

    def __init__(
        self,
        path: Path,
        *,
        encoding: str | None = None,
        delimiter: str | None = None,
        skip: int = 0,
        limit: int = MAX_TEXT,
    ) -> None:
        """Index the file.

        Args:
            encoding: of its text, by default UTF-8.
            delimiter: of a CSV file.
            skip: lines at its start that are no records.
            limit: bytes of the longest record that is read.

        Raises:
            DataError: there is no such plain file, it is UTF-16, or a CSV quote is never closed.
        """
        self.path = path
        self._encoding = encoding or "utf-8"
        self._delimiter = delimiter
        self._limit = limit
        try:
            "".encode(self._encoding)
        except (LookupError, UnicodeError):
            raise DataError(f"{path}: unknown encoding {encoding!r}; try gb18030") from None
        try:
            check_plain(path)
            self._end = path.stat().st_size
            self._newline = line_end(path)
            self._starts, self._numbers = self._index(skip)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} cannot be read: {_reason(error)}") from None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        """Return a record without its line end.

        Raises:
            DataError: it is not text in this encoding, or too long.
        """
        raw = self.raw(index)
        try:
            return valid_text(raw.decode(self._encoding)).rstrip("\r\n")
        except UnicodeError:
            raise DataError(f"{self.where(index)} is not {_named(self._encoding, raw)}") from None

    def raw(self, index: int, length: int | None = None) -> bytes:
        """Return the bytes of a record, or its first ``length``."""
        start = int(self._starts[index])
        end = int(self._starts[index + 1]) if index + 1 < len(self._starts) else self._end
        wanted = min(end - start, length or end - start)
        if wanted > self._limit:
            raise DataError(too_long(self.where(index), wanted, self._limit))
        return read_at(self.path, start, wanted)

    def where(self, index: int) -> str:
        return f"{path_text(self.path)}, line {self._numbers[index]}"

    def _index(self, skip: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        head = read_at(self.path, 0, 32)
        if what := mistaken(head):
            raise DataError(f"{self.path} is {what}")
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{self.path} is UTF-16; save it as UTF-8")
        first = 3 if head.startswith(b"\xef\xbb\xbf") else 0
        if self._delimiter is not None and self._has_quotes():
            starts, numbers = self._csv_records(first, self._delimiter)
        else:
            starts = np.concatenate([np.array([first]), *self._line_starts()])
            numbers = np.arange(1, len(starts) + 1, dtype=np.uint32)
        # An empty line is one or two bytes long; so is the text "a", so look at what is there.
        lengths = np.diff(starts, append=self._end)
        with self.path.open("rb") as stream:
            empty = [
                i
                for i in np.flatnonzero(lengths <= 2).tolist()
                if not _at(stream, int(starts[i]), int(lengths[i])).strip()
            ]
        # What follows an empty line keeps its start; what precedes it ends there, as white space.
        keep = np.delete(np.arange(len(starts)), empty)
        keep = keep[numbers[keep] > skip]
        return starts[keep], numbers[keep]

    def _line_starts(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield where lines after the first start."""
        for offset, block in _blocks(self.path):
            ends = np.frombuffer(block, np.uint8) == ord(self._newline)
            yield np.flatnonzero(ends) + (offset + 1)

    def _has_quotes(self) -> bool:
        return any(b'"' in block for _, block in _blocks(self.path))

    def _csv_records(
        self, first: int, delimiter: str
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Find records by the csv module itself: a lone quote within a field is no quote.

        A quoted field that takes in the lines after it is an error. What is wrong within one line
        is said when that record is read.
        """
        position = first
        starts: list[int] = []
        numbers: list[int] = []
        taken: list[str] = []

        def lines() -> Iterator[str]:
            nonlocal position
            for line in stream_lines(self.path, first, self._newline, self._limit):
                position += len(line)
                # One character a byte; quotes are ASCII. The csv module ends lines at LF only if
                # nothing is behind it.
                text = line.removesuffix(self._newline).decode("latin-1") + "\n"
                taken.append(text)
                yield text

        reader = csv.reader(lines(), delimiter=delimiter, strict=True)
        fields = 0
        while True:
            start, number = position, reader.line_num + 1
            taken.clear()
            wrong: csv.Error | None = None
            try:
                record = next(reader, None)
                if record is None:
                    return np.array(starts, np.int64), np.array(numbers, np.uint32)
                fields = fields or len(record)
            except csv.Error as error:
                wrong = error
            if wrong is not None and "unexpected end of data" in str(wrong):
                raise DataError(f"{self.path}, line {number}: {_UNCLOSED}") from None
            if len(taken) > 1 and (wrong is not None or _swallows(taken, delimiter, fields)):
                raise DataError(
                    f"{self.path}, line {number}: {_UNCLOSED}; it takes in {len(taken) - 1:,} more "
                    "lines"
                ) from None
            starts.append(start)
            numbers.append(number)


_UNCLOSED = 'a quote is opened here and not closed; double a quote that is text (""), or remove it'


def _swallows(lines: Sequence[str], delimiter: str, fields: int) -> bool:
    """Whether the lines of one CSV record are rather records of their own."""
    if len(lines) > _MOST_LINES:
        return True
    inner = lines[1:-1]
    return len(inner) >= _MANY_LINES and all(
        line.count(delimiter) == fields - 1 > 0 for line in inner
    )


def line_end(path: Path) -> bytes:
    """Return the byte that ends the lines of a file: CR in files of old Macs and some of Excel's,
    LF in all others."""
    _, block = next(_blocks(path), (0, b""))
    return _CR if _CR in block and _LF not in block else _LF


def stream_lines(
    path: Path, first: int = 0, newline: bytes = _LF, limit: int = MAX_TEXT
) -> Iterator[bytes]:
    """Yield the lines of a file, with their ends, from a place on.

    Raises:
        DataError: a line is longer than ``limit`` bytes.
    """
    number = 1
    rest: list[bytes] = []  # joined once, so that a long line is not copied for each block
    held = 0
    for _, block in _blocks(path, first, min(_BLOCK, 1 << 20)):
        pieces = block.split(newline)
        for piece in pieces[:-1]:
            yield b"".join([*rest, piece, newline])
            rest, held = [], 0
            number += 1
        rest.append(pieces[-1])
        held += len(pieces[-1])
        if held > limit:
            raise DataError(too_long(f"{path_text(path)}, line {number}", held, limit))
    if held:
        yield b"".join(rest)


def too_long(where: str, size: int, limit: int) -> str:
    """Say that a record is too long."""
    return f"{where} has {size:,} bytes or more, above the limit of {limit:,}; end lines with LF"


def _blocks(path: Path, first: int = 0, size: int = _BLOCK) -> Iterator[tuple[int, bytes]]:
    offset = first
    with path.open("rb") as stream:
        stream.seek(first)
        while block := stream.read(size):
            yield offset, block
            offset += len(block)


def _at(stream: BinaryIO, offset: int, length: int) -> bytes:
    stream.seek(offset)
    return stream.read(length)


def read_at(path: Path, offset: int, length: int) -> bytes:
    """Read a piece of a file.

    Opening it each time costs some 10 us, a hundredth of decoding a picture, and leaves nothing to
    share between threads and processes.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(offset)
            return stream.read(length)
    except (OSError, ValueError) as error:
        raise DataError(f"{path_text(path)} cannot be read: {_reason(error)}") from None


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Read a JSON object, whose strings are then valid Unicode.

    Raises:
        DataError: it is none; ``where`` is named.
    """
    try:
        values = read_json(text)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{where} is not a JSON object: {text[:40]!r}")
    return values


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _named(encoding: str, raw: bytes) -> str:
    """Say what the bytes are not, and what they may be."""
    if encoding.lower().replace("-", "") != "utf8":
        return f"{encoding}; leave ?encoding= out, or name the right one"
    try:
        reads = raw.decode("gb18030").strip()[:20]
    except UnicodeDecodeError:
        return "UTF-8; save the file as UTF-8"
    return f"UTF-8; as GBK it reads {reads!r}: add ?encoding=gb18030, or save the file as UTF-8"

"""Text files of any size, a line or a CSV record at a time, in any order."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import DataError

_BLOCK = 16 << 20


class Lines:
    """The records of a UTF-8 file by number: 12 bytes of memory each, the text stays on disk.

    A record is a line, or with ``delimiter`` a CSV record, whose quoted fields may span lines.
    Empty lines are left out. A byte order mark and CRLF are understood. No file stays
    open, so that it can be pickled and forked.
    """

    def __init__(
        self, path: Path, *, encoding: str | None = None, delimiter: str | None = None
    ) -> None:
        """Index the file; ``encoding`` is that of its text, by default UTF-8.

        Raises:
            DataError: there is no such file, it is UTF-16, or a CSV quote is never closed.
        """
        self.path = path
        self._encoding = encoding or "utf-8"
        self._delimiter = delimiter
        try:
            "".encode(self._encoding)
        except LookupError:
            raise DataError(f"{path}: unknown encoding {encoding!r}; try gb18030") from None
        try:
            self._end = path.stat().st_size
            self._starts, self._numbers = self._index()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        """Return a record without its line end.

        Raises:
            DataError: it is not text in this encoding.
        """
        raw = self.raw(index)
        try:
            return raw.decode(self._encoding).rstrip("\r\n")
        except UnicodeDecodeError:
            raise DataError(f"{self.where(index)} is not {_named(self._encoding, raw)}") from None

    def raw(self, index: int, length: int | None = None) -> bytes:
        """Return the bytes of a record, or its first ``length``."""
        start = int(self._starts[index])
        end = int(self._starts[index + 1]) if index + 1 < len(self._starts) else self._end
        return read_at(self.path, start, min(end - start, length or end - start))

    def where(self, index: int) -> str:
        return f"{self.path}, line {self._numbers[index]}"

    def _index(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        head = read_at(self.path, 0, 4)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{self.path} is UTF-16; save it as UTF-8")
        first = 3 if head.startswith(b"\xef\xbb\xbf") else 0
        if self._delimiter is not None and self._has_quotes():
            starts, numbers = self._csv_records(first)
        else:
            starts = np.concatenate([np.array([first]), *self._line_ends()])
            numbers = np.arange(1, len(starts) + 1, dtype=np.uint32)
        # An empty line is one or two bytes long; so is the text "a", so look at what is there.
        lengths = np.diff(starts, append=self._end)
        empty = [
            i
            for i in np.flatnonzero(lengths <= 2).tolist()
            if not read_at(self.path, int(starts[i]), int(lengths[i])).strip()
        ]
        # What follows an empty line keeps its start; what precedes it ends there, as white space.
        keep = np.delete(np.arange(len(starts)), empty)
        return starts[keep], numbers[keep]

    def _line_ends(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield where lines after the first start."""
        for offset, block in self._blocks():
            yield np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (offset + 1)

    def _has_quotes(self) -> bool:
        return any(b'"' in block for _, block in self._blocks())

    def _blocks(self) -> Iterator[tuple[int, bytes]]:
        offset = 0
        with self.path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                yield offset, block
                offset += len(block)

    def _csv_records(self, first: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Find records by the csv module itself: a lone quote within a field is no quote."""
        position = first
        starts: list[int] = []
        numbers: list[int] = []

        def lines() -> Iterator[str]:
            nonlocal position
            with self.path.open("rb") as stream:
                stream.seek(first)
                for line in stream:
                    position += len(line)
                    yield line.decode("latin-1")  # one character a byte; quotes are ASCII

        reader = csv.reader(lines(), delimiter=self._delimiter or ",")
        while True:
            start, number = position, reader.line_num + 1
            try:
                if next(reader, None) is None:
                    return np.array(starts, np.int64), np.array(numbers, np.uint32)
            except csv.Error as error:
                raise DataError(
                    f"{self.path}, line {number}: {error}; a quote is opened here and not closed"
                ) from None
            starts.append(start)
            numbers.append(number)


def read_at(path: Path, offset: int, length: int) -> bytes:
    """Read a piece of a file.

    Opening it each time costs some 10 us, a hundredth of decoding a picture, and leaves nothing to
    share between threads and processes.
    """
    with path.open("rb", buffering=0) as stream:
        stream.seek(offset)
        return stream.read(length)


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: it is none; ``where`` is named.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{where} is not a JSON object: {text[:40]!r}")
    return values


def _named(encoding: str, raw: bytes) -> str:
    """Say what the bytes are not, and what they may be."""
    if encoding.lower().replace("-", "") != "utf8":
        return f"{encoding}; leave ?encoding= out, or name the right one"
    try:
        reads = raw.decode("gb18030").strip()[:20]
    except UnicodeDecodeError:
        return "UTF-8; save the file as UTF-8"
    return f"UTF-8; as GBK it reads {reads!r}: add ?encoding=gb18030, or save the file as UTF-8"

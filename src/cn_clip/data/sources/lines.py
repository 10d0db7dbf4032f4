"""Random access to the lines or CSV records of large text files."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cn_clip.errors import CNClipError, DataError
from cn_clip.files import HEAD, MAX_TEXT, check_regular, wrong_format
from cn_clip.text import path_text, read_json, valid_text
from cn_clip.translation import N_, _, translate

_BLOCK = 16 << 20
_LF, _CR = b"\n", b"\r"
_MANY_LINES = 10  # within a quoted field, which may be records after an unclosed quote
_MAX_LINES = 100  # of a record of which nothing tells whether they are
_ALIKE = 0.9  # of these lines


class Lines:
    """The records of a text file by index; 12 bytes of memory each, the text stays on disk.

    A record is a line, or with ``delimiter`` a CSV record, whose quoted fields may span lines.
    Empty lines are skipped. A byte order mark and any line ends are accepted. No file stays open,
    so an instance can be pickled and forked.
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
            encoding: of the text, by default UTF-8.
            delimiter: of a CSV file.
            skip: number of lines before the first record.
            limit: maximum bytes of a record.

        Raises:
            DataError: the file is missing or not a regular file, it is UTF-16, or a CSV quote is
                not closed.
        """
        self.path = path
        self._encoding = encoding or "utf-8"
        self._delimiter = delimiter
        self._limit = limit
        try:
            "".encode(self._encoding)
        except (LookupError, ValueError):
            raise DataError(
                _(
                    "{path}: unknown encoding {encoding!r}; try gb18030",
                    path=path,
                    encoding=encoding,
                )
            ) from None
        try:
            check_regular(path)
            self._end = path.stat().st_size
            self._newline = line_end(path)
            self._starts, self._numbers = self._index(skip)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                _("{path} cannot be read: {reason}", path=path, reason=_reason(error))
            ) from None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        """Return a record without its line end.

        Raises:
            DataError: the record has another encoding, or is too long.
        """
        raw = self.raw(index)
        try:
            return valid_text(raw.decode(self._encoding)).rstrip("\r\n")
        except UnicodeError:
            raise DataError(
                _(
                    "{where} is not {encoding}",
                    where=self.where(index),
                    encoding=self._encoding_advice(raw),
                )
            ) from None

    def raw(self, index: int, length: int | None = None) -> bytes:
        """Return the bytes of a record, or the first ``length`` of them."""
        start = int(self._starts[index])
        end = int(self._starts[index + 1]) if index + 1 < len(self._starts) else self._end
        wanted = min(end - start, length or end - start)
        if wanted > self._limit:
            raise DataError(too_long_message(self.where(index), wanted, self._limit))
        return read_at(self.path, start, wanted)

    def where(self, index: int) -> str:
        return _("{path}, line {number}", path=path_text(self.path), number=self._numbers[index])

    def _encoding_advice(self, raw: bytes) -> str:
        """Return the expected encoding, and what to give instead."""
        if self._encoding.lower().replace("-", "") != "utf8":
            return _("{encoding}; remove ?encoding=, or set the right one", encoding=self._encoding)
        try:
            as_gbk = raw.decode("gb18030").strip()[:20]
        except UnicodeDecodeError:
            return _("UTF-8; save the file as UTF-8")
        option = "?encoding=gb18030"
        return _(
            "UTF-8; as GBK it reads {as_gbk!r}: give {source}, or save the file as UTF-8",
            as_gbk=as_gbk,
            source=f'"csv:{self.path}{option}"' if self._delimiter is not None else option,
        )

    def _index(self, skip: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        head = read_at(self.path, 0, HEAD)
        if reason := wrong_format(head):
            raise DataError(_("{path} is {reason}", path=self.path, reason=reason))
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(_("{path} is UTF-16; save it as UTF-8", path=self.path))
        first = 3 if head.startswith(b"\xef\xbb\xbf") else 0
        if self._delimiter is not None and self._has_quotes():
            starts, numbers = self._csv_records(first, self._delimiter)
        else:
            starts = np.concatenate([np.array([first]), *self._line_starts()])
            numbers = np.arange(1, len(starts) + 1, dtype=np.uint32)
        # Candidates have one or two bytes, and must be white space.
        lengths = np.diff(starts, append=self._end)
        with self.path.open("rb") as stream:
            empty = [
                i
                for i in np.flatnonzero(lengths <= 2).tolist()
                if not _read_bytes(stream, int(starts[i]), int(lengths[i])).strip()
            ]
        # The record before an empty line includes it, as trailing white space.
        keep = np.delete(np.arange(len(starts)), empty)
        keep = keep[numbers[keep] > skip]
        return starts[keep], numbers[keep]

    def _line_starts(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the offsets of all lines but the first, in arrays."""
        for offset, block in _blocks(self.path):
            ends = np.frombuffer(block, np.uint8) == ord(self._newline)
            yield np.flatnonzero(ends) + (offset + 1)

    def _has_quotes(self) -> bool:
        return any(b'"' in block for _, block in _blocks(self.path))

    def _csv_records(
        self, first: int, delimiter: str
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Find records with the csv module: a quote inside an unquoted field is literal.

        An unclosed quote is an error. Errors within one line are raised when it is read.
        """
        position = first
        starts: list[int] = []
        numbers: list[int] = []
        consumed: list[str] = []

        def lines() -> Iterator[str]:
            nonlocal position
            for line in stream_lines(self.path, first, self._newline, self._limit):
                position += len(line)
                # latin-1: one character per byte, and quotes are ASCII. The csv module expects LF
                # as the line end.
                text = line.removesuffix(self._newline).decode("latin-1") + "\n"
                consumed.append(text)
                yield text

        reader = csv.reader(lines(), delimiter=delimiter, strict=True)
        fields = 0
        while True:
            start, number = position, reader.line_num + 1
            consumed.clear()
            csv_error: csv.Error | None = None
            try:
                record = next(reader, None)
                if record is None:
                    return np.array(starts, np.int64), np.array(numbers, np.uint32)
                fields = fields or len(record)
            except csv.Error as error:
                record, csv_error = [], error
            if csv_error is not None and "unexpected end of data" in str(csv_error):
                raise DataError(
                    _(
                        "{path}, line {number}: {unclosed}",
                        path=self.path,
                        number=number,
                        unclosed=translate(_UNCLOSED),
                    )
                ) from None
            if len(consumed) > 1 and (
                csv_error is not None or _swallows(record, consumed, delimiter, fields)
            ):
                raise DataError(
                    _(
                        "{path}, line {number}: {unclosed}; it spans {count:,} more lines",
                        path=self.path,
                        number=number,
                        unclosed=translate(_UNCLOSED),
                        count=len(consumed) - 1,
                    )
                ) from None
            starts.append(start)
            numbers.append(number)


_UNCLOSED = N_('a quote is opened and not closed; double literal quotes (""), or remove it')


def _swallows(record: Sequence[str], lines: Sequence[str], delimiter: str, fields: int) -> bool:
    """Return whether the lines of one CSV record are probably separate records.

    They are if they have the header's number of fields, and fields of the same kinds as the record
    has beside its quoted one: lines of a caption have no path, number or URL there.
    """
    rows = [line.split(delimiter) for line in lines[1:-1] if line.strip()]
    if len(rows) < _MANY_LINES:
        return False
    beside = [(n, _kind(field)) for n, field in enumerate(record) if "\n" not in field]
    kinds = {n: kind for n, kind in beside if kind} if len(record) == fields else {}
    alike = sum(
        len(row) == fields > 1 and all(_kind(row[n]) == kind for n, kind in kinds.items())
        for row in rows
    )
    if kinds:
        return alike >= _ALIKE * len(rows)
    return alike == len(rows) or len(lines) > _MAX_LINES


def _kind(field: str) -> str:
    """Return the kind of a field; empty for text."""
    field = field.strip()
    if "://" in field:
        return "URL"
    if re.search(r"\.[A-Za-z]\w{1,4}$", field, re.ASCII):
        return "file"
    if re.fullmatch(r"[0-9]+", field):
        return "number"
    return "word" if re.fullmatch(r"[!-~]+", field) else ""


def line_end(path: Path) -> bytes:
    """Return the line end of a file: CR (classic Mac OS, some Excel files) or LF."""
    _, block = next(_blocks(path), (0, b""))
    return _CR if _CR in block and _LF not in block else _LF


def stream_lines(
    path: Path, first: int = 0, newline: bytes = _LF, limit: int = MAX_TEXT
) -> Iterator[bytes]:
    """Yield the lines of a file, with their ends, from offset ``first`` on.

    Raises:
        DataError: a line is longer than ``limit`` bytes.
    """
    number = 1
    rest: list[bytes] = []  # joined once: a long line is not copied for every block
    length = 0
    for _unused, block in _blocks(path, first, min(_BLOCK, 1 << 20)):
        pieces = block.split(newline)
        for piece in pieces[:-1]:
            yield b"".join([*rest, piece, newline])
            rest, length = [], 0
            number += 1
        rest.append(pieces[-1])
        length += len(pieces[-1])
        if length > limit:
            raise DataError(
                too_long_message(
                    _("{path}, line {number}", path=path_text(path), number=number), length, limit
                )
            )
    if length:
        yield b"".join(rest)


def too_long_message(where: str, size: int, limit: int) -> str:
    """Return the message for a record that is too long."""
    return _(
        "{where} has {size:,} bytes or more, above the limit of {limit:,}; end lines with LF",
        where=where,
        size=size,
        limit=limit,
    )


def _blocks(path: Path, first: int = 0, size: int = _BLOCK) -> Iterator[tuple[int, bytes]]:
    offset = first
    with path.open("rb") as stream:
        stream.seek(first)
        while block := stream.read(size):
            yield offset, block
            offset += len(block)


def _read_bytes(stream: BinaryIO, offset: int, length: int) -> bytes:
    stream.seek(offset)
    return stream.read(length)


def read_at(path: Path, offset: int, length: int) -> bytes:
    """Read ``length`` bytes of a file at an offset.

    Opening the file costs about 10 us, 1 % of decoding an image, and there is no file object to
    share between threads and processes.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(offset)
            return stream.read(length)
    except (OSError, ValueError) as error:
        raise DataError(
            _("{path} cannot be read: {reason}", path=path_text(path), reason=_reason(error))
        ) from None


def json_object(
    text: str | bytes, where: str, *, kind: type[CNClipError] = DataError
) -> dict[str, Any]:
    """Parse a JSON object of one line; its strings become valid Unicode.

    Raises:
        DataError, or the given ``kind``: it is not a JSON object; the message names ``where``.
    """
    try:
        values = read_json(text)
    except ValueError as error:
        raise kind(
            _(
                "{where} is not JSON: {error}{json_advice}",
                where=where,
                error=error,
                json_advice=_json_advice(text),
            )
        ) from None
    if not isinstance(values, dict):
        raise kind(
            _(
                "{where} is not a JSON object: {text!r}{json_advice}",
                where=where,
                text=text[:40],
                json_advice=_json_advice(text),
            )
        )
    return values


def _json_advice(text: str | bytes) -> str:
    """Return the remedy if a line is the start of a JSON array, or of an object over lines."""
    start = text.strip() if isinstance(text, str) else ""  # bytes are not of a line
    if not start.startswith("[") and start != "{":
        return ""
    elements = "'.[]'" if start.startswith("[") else "."
    return _(
        "; write one object per line, as JSON Lines: jq -c {elements} FILE > NEW.jsonl",
        elements=elements,
    )


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)

"""Pairs listed in CSV or JSON Lines files, with the paths of their images, and the contract of
tables; Parquet has a file of its own."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from cn_clip.data.sources.base import Row
from cn_clip.data.sources.lines import Lines, json_object, read_at
from cn_clip.errors import DataError
from cn_clip.files import beside, check_plain, read_file

# The names that columns go by, the first one found is taken.
IMAGE = (
    "image",
    "image_path",
    "filepath",
    "file_name",
    "filename",
    "file",
    "path",
    "img",
    "url",
    "URL",
)
TEXT = ("text", "caption", "title", "TEXT", "sentence", "query_text")
IMAGE_ID, TEXT_ID = ("image_id", "img_id", "photo_id"), ("text_id", "caption_id", "query_id")
KNOWN = {"image": IMAGE, "text": TEXT, "image_id": IMAGE_ID, "text_id": TEXT_ID}
_DELIMITERS = (",", "\t", ";", "|")
_HEAD = 1 << 16  # bytes at the start of a file in which its columns are looked for

Given = Mapping[str, str | None]
"""Of image, text, image_id and text_id: the column that was named, if one was."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column is what; an empty one is not there."""

    image: str
    text: str
    image_id: str = ""
    text_id: str = ""


class Table(Protocol):
    """Records by number, each a mapping from the names of columns."""

    columns: Columns

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def content(self, index: int) -> bytes | None:
        """Return the bytes of an image that the table itself holds; None if it holds paths."""
        ...

    def where(self, index: int) -> str: ...


class Manifest:
    """A table's rows as pairs. Paths start at ``root``, by default the table's folder.

    A web address stands for the file of its last part in ``root``: ``http://a.b/c/cat.jpg`` is
    ``root/cat.jpg``. A path with ``\\``, written on Windows, is found by the one with ``/``.
    """

    def __init__(self, name: str, table: Table, root: Path) -> None:
        self.name = name
        self._table, self._root = table, root
        self._columns = table.columns

    def __len__(self) -> int:
        return len(self._table)

    def row(self, index: int) -> Row:
        record, columns = self._table[index], self._columns
        return Row(
            self._string(record, columns.text, index),
            self._id(record, columns.image_id or columns.image, index),
            self._id(record, columns.text_id, index) if columns.text_id else str(index),
        )

    def image(self, index: int) -> bytes:
        content = self._table.content(index)
        if content is not None:
            return content
        given = self._string(self._table[index], self._columns.image, index)
        path: Path | str = given
        try:
            path = beside(self._root, _local(given))
            return read_file(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            remedy = "download it first, or " if "://" in given else ""
            raise DataError(
                f"{self.where(index)}: no picture {path} ({reason}); {remedy}name the folder of "
                "the pictures with ?root=FOLDER"
            ) from None

    def where(self, index: int) -> str:
        return self._table.where(index)

    def unmatched(self) -> list[str]:
        return []

    def _string(self, record: Mapping[str, Any], column: str, index: int) -> str:
        value = record.get(column)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            raise DataError(
                f"{self.where(index)}: {column} is a list of {len(value)}; give each caption a row "
                "of its own"
            )
        raise DataError(f"{self.where(index)}: {column} is {value!r:.40}; expected a string")

    def _id(self, record: Mapping[str, Any], column: str, index: int) -> str:
        value = record.get(column)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
        raise DataError(
            f"{self.where(index)}: {column} is {value!r:.40}; expected a string or a whole number"
        )


class JsonLines:
    """``.jsonl``: a JSON object a line."""

    def __init__(self, name: str, path: Path, given: Given, encoding: str | None = None) -> None:
        self._lines = Lines(path, encoding=encoding)
        self.columns = chosen(name, tuple(self[0]) if len(self._lines) else (), given)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return json_object(self._lines[index], self.where(index))

    def content(self, index: int) -> bytes | None:
        return None

    def where(self, index: int) -> str:
        return self._lines.where(index)


class Csv:
    """``.csv`` with a header; ``.tsv`` has tabs for commas.

    Another separator is found if the header has the columns by it and by no other one, or is named
    by a first line ``sep=;``, as Excel writes it.
    """

    def __init__(self, name: str, path: Path, given: Given, encoding: str | None = None) -> None:
        self._delimiter, skip = _dialect(path, given, encoding)
        self._lines = Lines(path, encoding=encoding, delimiter=self._delimiter, skip=skip)
        if not len(self._lines):
            raise DataError(f"{path} is empty; its first line names the columns")
        self._names = tuple(each.strip() for each in self._fields(0))
        self.columns = chosen(name, self._names, given)

    def __len__(self) -> int:
        return len(self._lines) - 1

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        fields = self._fields(index + 1)
        if len(fields) != len(self._names):
            raise DataError(
                f"{self.where(index)} has {len(fields)} fields, its header {len(self._names)}; "
                "put fields that hold a separator in double quotes"
            )
        return dict(zip(self._names, fields, strict=True))

    def content(self, index: int) -> bytes | None:
        return None

    def where(self, index: int) -> str:
        return self._lines.where(index + 1)

    def _fields(self, record: int) -> list[str]:
        # Given with its line ends, as the csv module wants it, for quoted fields of several lines.
        text = io.StringIO(self._lines[record], newline="")
        try:
            fields, *more = csv.reader(text, delimiter=self._delimiter, strict=True)
        except (csv.Error, ValueError) as error:
            raise DataError(
                f"{self._lines.where(record)}: {error}; put a field that holds quotes or line "
                "ends in double quotes, and double the quotes in it"
            ) from None
        if more:
            raise DataError(
                f"{self._lines.where(record)} has a line end within; put the field in double quotes"
            )
        return fields


def _dialect(path: Path, given: Given, encoding: str | None) -> tuple[str, int]:
    """Return the separator of a CSV file, and how many lines are before its header."""
    default = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        head = read_head(path).decode(encoding or "utf-8", "replace").removeprefix("\ufeff")
    except (LookupError, UnicodeError):
        return default, 0  # reading the file reports it
    lines = [line for line in re.split(r"[\r\n]+", head) if line.strip()]
    if not lines:
        return default, 0
    if named := re.fullmatch(r"sep=(.)\s*", lines[0], re.IGNORECASE | re.DOTALL):
        return named[1], 1
    fitting = [each for each in _DELIMITERS if _fits(_header(lines[0], each), given)]
    return (fitting[0] if len(fitting) == 1 and default not in fitting else default), 0


def read_head(path: Path) -> bytes:
    """Return the first bytes of a plain file, none if it is none."""
    try:
        check_plain(path)
    except OSError:
        return b""
    return read_at(path, 0, _HEAD)


def _header(line: str, delimiter: str) -> list[str]:
    try:
        return [each.strip() for each in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _fits(columns: Sequence[str], given: Given) -> bool:
    return all(
        given[what] in columns if given.get(what) else any(each in columns for each in KNOWN[what])
        for what in ("image", "text")
    )


def chosen(
    name: str,
    columns: Sequence[str],
    given: Given,
    usable: Callable[[str, str], bool] = lambda what, column: True,
) -> Columns:
    """Choose the columns of a table: those that were named, else those of a usual name, first those
    that are ``usable``.

    Raises:
        DataError: there is none, or two have its name.
    """
    found: dict[str, str] = {}
    for what, known in KNOWN.items():
        named = given.get(what)
        if named is not None and named not in columns:
            raise DataError(f"{name}: no column {named!r}; it has {', '.join(columns)}")
        usual = sorted(
            (each for each in known if each in columns), key=lambda each: not usable(what, each)
        )
        column = named if named is not None else next(iter(usual), "")
        if not column and what in ("image", "text"):
            raise DataError(
                f"{name}: no column for the {what} ({', '.join(known)}) among "
                f"{', '.join(columns) or 'none'}; name it with ?{what}=COLUMN"
            )
        if column and columns.count(column) > 1:
            raise DataError(f"{name}: two columns are called {column!r}; rename one of them")
        found[what] = column
    return Columns(**found)


def _local(given: str) -> str:
    """Turn a web address into the name of the file that it was downloaded to."""
    if given.startswith("file://"):
        return unquote(urlsplit(given).path)
    if given.startswith(("http://", "https://")):
        return unquote(urlsplit(given).path).rpartition("/")[2]
    return given

"""Manifests of pairs: CSV, JSON Lines, and the protocol of tables, which Parquet implements too."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from cn_clip.data.sources.base import Row
from cn_clip.data.sources.lines import Lines, json_object, read_at
from cn_clip.data.sources.remote import read_object
from cn_clip.data.sources.shard_file import LocalFile, ShardFile
from cn_clip.errors import DataError
from cn_clip.files import check_regular, read_file, resolve_in
from cn_clip.image.limits import MAX_ENCODED
from cn_clip.translation import _

# Common column names, in order of preference.
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
    "图片",
    "图像",
    "图片路径",
    "图片文件",
    "文件名",
    "图片链接",
)
TEXT = (
    "text",
    "caption",
    "title",
    "sentence",
    "query_text",
    "description",
    "文本",
    "描述",
    "标题",
    "图片描述",
    "商品标题",
    "商品名称",
)
IMAGE_ID, TEXT_ID = ("image_id", "img_id", "photo_id"), ("text_id", "caption_id", "query_id")
COLUMN_NAMES = {"image": IMAGE, "text": TEXT, "image_id": IMAGE_ID, "text_id": TEXT_ID}
PAIR = ("image", "text")
"""The columns that a table of pairs must have."""
DELIMITERS = (",", "\t", ";", "|")
_HEAD = 1 << 16  # bytes read to detect the separator

NamedColumns = Mapping[str, str | None]
"""image, text, image_id and text_id -> the column that the user named, or None."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Column names; empty if the table has no such column."""

    image: str
    text: str
    image_id: str = ""
    text_id: str = ""


class Table(Protocol):
    """Records (column -> value) by index."""

    columns: Columns

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def content(self, index: int) -> bytes | None:
        """Return the bytes of an embedded image; None if the table holds paths."""
        ...

    def where(self, index: int) -> str: ...


class Manifest:
    """The rows of a table as pairs. Paths are relative to ``root``, by default the table's folder.

    A URL means its downloaded file in ``root``: ``http://a.b/c/cat.jpg`` is ``root/cat.jpg``. In
    paths written on Windows, ``\\`` means ``/``. ``root`` may be the URL of a folder.
    """

    def __init__(
        self,
        name: str,
        table: Table,
        root: Path | str,
        table_file: ShardFile,
        encoding: str | None = None,
    ) -> None:
        """Name the pairs of a table.

        Args:
            name: URI of the source.
            table: its records.
            root: folder of the images; a string is a URL.
            table_file: the table's file.
            encoding: of its text.
        """
        self.name, self.table_file = name, table_file
        self._table, self._root = table, root
        self._columns = table.columns
        layout = repr((table.columns, encoding)).encode(errors="surrogateescape")
        self.layout = hashlib.blake2b(layout, digest_size=4).hexdigest()
        """Distinguishes what may be read of the file in several ways."""

    def __len__(self) -> int:
        return len(self._table)

    @property
    def is_remote(self) -> bool:
        """Whether the table or its images are behind a URL."""
        return isinstance(self._root, str) or not isinstance(self.table_file, LocalFile)

    def row(self, index: int) -> Row:
        record, columns = self._table[index], self._columns
        image_id = columns.image_id or columns.image
        return Row(
            self._string(record, columns.text, index) if columns.text else "",
            self._id(record, image_id, index) if image_id else "",
            self._id(record, columns.text_id, index) if columns.text_id else str(index),
        )

    def file(self, index: int) -> Path | None:
        """Return the path of an image; None if the table holds its bytes, it is behind a URL, or
        the path is invalid.

        Raises:
            DataError: the row is invalid.
        """
        if isinstance(self._root, str) or self._table.content(index) is not None:
            return None
        value = self._string(self._table[index], self._columns.image, index)
        try:
            return resolve_in(self._root, _downloaded_name(value))
        except ValueError:  # an invalid URL
            return None

    def image(self, index: int) -> bytes:
        content = self._table.content(index)
        if content is not None:
            return content
        value = self._string(self._table[index], self._columns.image, index)
        path: Path | str = value
        if isinstance(self._root, str):
            return read_object(f"{self._root}/{_downloaded_name(value)}", MAX_ENCODED)
        try:
            path = resolve_in(self._root, _downloaded_name(value))
            return read_file(path, MAX_ENCODED)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            remedy = _("download it first, or ") if "://" in value else ""
            raise DataError(
                _(
                    "{where}: no image {path} ({reason}); {remedy}set the folder of the images "
                    "with ?root=FOLDER",
                    where=self.where(index),
                    path=path,
                    reason=reason,
                    remedy=remedy,
                )
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
                _(
                    "{where}: {column} is a list of {value_count}; give every caption its own row",
                    where=self.where(index),
                    column=column,
                    value_count=len(value),
                )
            )
        raise DataError(
            _(
                "{where}: {column} is {value!r:.40}; expected a string",
                where=self.where(index),
                column=column,
                value=value,
            )
        )

    def _id(self, record: Mapping[str, Any], column: str, index: int) -> str:
        value = record.get(column)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
        raise DataError(
            _(
                "{where}: {column} is {value!r:.40}; expected a string or a whole number",
                where=self.where(index),
                column=column,
                value=value,
            )
        )


class JsonLines:
    """``.jsonl``: one JSON object per line."""

    def __init__(
        self,
        name: str,
        path: Path,
        named: NamedColumns,
        encoding: str | None = None,
        required: Sequence[str] = PAIR,
    ) -> None:
        self._lines = Lines(path, encoding=encoding)
        columns = tuple(self[0]) if len(self._lines) else ()
        self.columns = choose_columns(name, columns, named, required)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return json_object(self._lines[index], self.where(index))

    def content(self, index: int) -> bytes | None:
        return None

    def where(self, index: int) -> str:
        return self._lines.where(index)


class Csv:
    """``.csv`` with a header; ``.tsv`` is separated by tabs.

    Another separator is detected if it is the only one that gives the header an image and a text
    column, or if the first line is ``sep=;``, as Excel writes it.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        named: NamedColumns,
        encoding: str | None = None,
        required: Sequence[str] = PAIR,
    ) -> None:
        self._delimiter, skip = _dialect(path, named, encoding, required)
        self._lines = Lines(path, encoding=encoding, delimiter=self._delimiter, skip=skip)
        if not len(self._lines):
            raise DataError(_("{path} is empty; expected a header in the first line", path=path))
        self._names = tuple(field.strip() for field in self._fields(0))
        self.columns = choose_columns(name, self._names, named, required)

    def __len__(self) -> int:
        return len(self._lines) - 1

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        fields = self._fields(index + 1)
        if len(fields) != len(self._names):
            raise DataError(
                _(
                    "{where} has {field_count} fields, its header {name_count}; quote fields that "
                    "hold a separator",
                    where=self.where(index),
                    field_count=len(fields),
                    name_count=len(self._names),
                )
            )
        return dict(zip(self._names, fields, strict=True))

    def content(self, index: int) -> bytes | None:
        return None

    def where(self, index: int) -> str:
        return self._lines.where(index + 1)

    def _fields(self, record: int) -> list[str]:
        # The csv module needs the line ends of quoted fields that span lines.
        text = io.StringIO(self._lines[record], newline="")
        try:
            fields, *more = csv.reader(text, delimiter=self._delimiter, strict=True)
        except (csv.Error, ValueError) as error:
            raise DataError(
                _(
                    "{where}: {error}; quote fields that hold quotes or line ends, and double the "
                    "quotes in them",
                    where=self._lines.where(record),
                    error=error,
                )
            ) from None
        if more:
            raise DataError(
                _("{where} holds a line end; quote the field", where=self._lines.where(record))
            )
        return fields


def _dialect(
    path: Path, named: NamedColumns, encoding: str | None, required: Sequence[str]
) -> tuple[str, int]:
    """Return the separator of a CSV file, and the number of lines before its header."""
    default = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        head = read_head(path).decode(encoding or "utf-8", "replace").removeprefix("\ufeff")
    except (LookupError, ValueError):
        return default, 0  # Lines reports it
    lines = [line for line in re.split(r"[\r\n]+", head) if line.strip()]
    if not lines:
        return default, 0
    if separator := re.fullmatch(r"sep=(.)\s*", lines[0], re.IGNORECASE | re.DOTALL):
        return separator[1], 1
    fitting = [d for d in DELIMITERS if _has_columns(header_fields(lines[0], d), named, required)]
    return (fitting[0] if len(fitting) == 1 and default not in fitting else default), 0


def read_head(path: Path) -> bytes:
    """Return the first bytes of a file; empty if it is not a regular file."""
    try:
        check_regular(path)
    except OSError:
        return b""
    return read_at(path, 0, _HEAD)


def header_fields(line: str, delimiter: str) -> list[str]:
    """Return the fields of one line of a CSV file, without spaces around them."""
    try:
        return [field.strip() for field in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _has_columns(columns: Sequence[str], named: NamedColumns, required: Sequence[str]) -> bool:
    return all(
        named[role] in columns if named.get(role) else bool(common_columns(role, columns))
        for role in required
    )


def common_columns(role: str, columns: Sequence[str]) -> list[str]:
    """Return the columns with a common name of a role, in order of preference.

    Case, spaces and hyphens are ignored: ``Image Path`` is ``image_path``.
    """
    by_plain_name: dict[str, list[str]] = {}
    for column in columns:
        by_plain_name.setdefault(_plain_name(column), []).append(column)
    return [column for name in COLUMN_NAMES[role] for column in by_plain_name.get(name, [])]


def _plain_name(column: str) -> str:
    return re.sub(r"[\s-]+", "_", column.strip().lower())


def choose_columns(
    name: str,
    columns: Sequence[str],
    named: NamedColumns,
    required: Sequence[str] = PAIR,
    usable: Callable[[str, str], bool] = lambda role, column: True,
) -> Columns:
    """Choose the columns of a table: named ones, otherwise those with a common name, ``usable``
    ones first.

    Raises:
        DataError: there is no ``required`` column, or the name of one is not unique.
    """
    chosen: dict[str, str] = {}
    for role, common in COLUMN_NAMES.items():
        column = named.get(role)
        if column is not None and column not in columns:
            raise DataError(
                _(
                    "{name}: no column {column!r}; it has {columns}",
                    name=name,
                    column=column,
                    columns=", ".join(columns),
                )
            )
        if column is None:
            candidates = common_columns(role, columns)
            candidates.sort(key=lambda known: not usable(role, known))
            column = next(iter(candidates), "")
        if not column and role in required:
            raise DataError(
                _(
                    "{name}: no column for the {role} ({common}, ...) among {columns}; name it "
                    "with ?{role}=COLUMN",
                    name=name,
                    role=role,
                    common=", ".join(_examples(common)),
                    columns=", ".join(columns) or _("none"),
                )
            )
        if column and columns.count(column) > 1:
            raise DataError(
                _(
                    "{name}: two columns are called {column!r}; rename one of them",
                    name=name,
                    column=column,
                )
            )
        chosen[role] = column
    return Columns(**chosen)


def _examples(common: Sequence[str]) -> list[str]:
    """Return some common names of a column, English and Chinese."""
    chinese = next(name for name in common if not name.isascii())
    return [*common[:2], chinese]


def _downloaded_name(path: str) -> str:
    """Return the file name that a URL is downloaded to; other paths stay unchanged."""
    if path.startswith("file://"):
        return unquote(urlsplit(path).path)
    if path.startswith(("http://", "https://")):
        return unquote(urlsplit(path).path).rpartition("/")[2]
    return path

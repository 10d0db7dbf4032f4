"""Pairs listed in CSV, JSON Lines or Parquet files, with the paths of their pictures."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from cn_clip.data.lines import Lines, json_object
from cn_clip.data.pair import Row
from cn_clip.errors import DataError, UsageError
from cn_clip.publish import published

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


class Table(Protocol):
    """Records by number, each a mapping from the names of columns."""

    columns: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def where(self, index: int) -> str: ...


class Manifest:
    """A table's rows as pairs. Paths start at ``root``, by default the table's folder.

    A web address stands for the file of its last part in ``root``: ``http://a.b/c/cat.jpg`` is
    ``root/cat.jpg``.
    """

    def __init__(
        self,
        name: str,
        table: Table,
        root: Path,
        *,
        image: str | None = None,
        text: str | None = None,
        image_id: str | None = None,
        text_id: str | None = None,
    ) -> None:
        self.name = name
        self._table, self._root = table, root
        self._image = _column(table, name, "image", image, IMAGE)
        self._text = _column(table, name, "text", text, TEXT)
        self._image_id = _column(table, name, "image_id", image_id, IMAGE_ID, optional=True)
        self._text_id = _column(table, name, "text_id", text_id, TEXT_ID, optional=True)

    def __len__(self) -> int:
        return len(self._table)

    def row(self, index: int) -> Row:
        record = self._table[index]
        return Row(
            self._string(record, self._text, index),
            self._id(record, self._image_id or self._image, index),
            self._id(record, self._text_id, index) if self._text_id else str(index),
        )

    def image(self, index: int) -> bytes:
        given = self._string(self._table[index], self._image, index)
        path = self._root / _local(given)
        try:
            return path.read_bytes()
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

    def __init__(self, path: Path, encoding: str | None = None) -> None:
        self._lines = Lines(path, encoding=encoding)
        self.columns = tuple(self[0]) if len(self._lines) else ()

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return json_object(self._lines[index], self.where(index))

    def where(self, index: int) -> str:
        return self._lines.where(index)


class Csv:
    """``.csv`` with a header; ``.tsv`` has tabs for commas."""

    def __init__(self, path: Path, encoding: str | None = None) -> None:
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self._lines = Lines(path, encoding=encoding, delimiter=self._delimiter)
        if not len(self._lines):
            raise DataError(f"{path} is empty; its first line names the columns")
        self.columns = tuple(name.strip() for name in self._fields(0))

    def __len__(self) -> int:
        return len(self._lines) - 1

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        fields = self._fields(index + 1)
        if len(fields) != len(self.columns):
            raise DataError(
                f"{self.where(index)} has {len(fields)} fields, its header {len(self.columns)}; "
                "put fields that hold a separator in double quotes"
            )
        return dict(zip(self.columns, fields, strict=True))

    def where(self, index: int) -> str:
        return self._lines.where(index + 1)

    def _fields(self, record: int) -> list[str]:
        # Given with its line ends, as the csv module wants it, for quoted fields of several lines.
        text = self._lines[record].splitlines(keepends=True)
        return next(csv.reader(text, delimiter=self._delimiter), [])


class Parquet:
    """``.parquet``, through a copy of its columns that can be read in any order.

    A Parquet file can only be read by groups of rows, often a million. Its columns are laid out
    once in ``cache`` as an Arrow file, which is mapped: memory holds the pages in use.
    """

    def __init__(self, path: Path, cache: Path) -> None:
        self._path, self._cache = path, cache
        if not cache.is_file():
            _lay_out(path, cache)
        self._open()

    def _open(self) -> None:
        arrow = _arrow("pyarrow")
        with arrow.memory_map(str(self._cache)) as mapped:
            self._table = arrow.ipc.open_file(mapped).read_all()
        self.columns = tuple(self._table.column_names)

    def __getstate__(self) -> tuple[Path, Path]:
        return self._path, self._cache

    def __setstate__(self, state: tuple[Path, Path]) -> None:
        self._path, self._cache = state
        self._open()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {
            name: self._table.column(number)[index].as_py()
            for number, name in enumerate(self.columns)
        }

    def where(self, index: int) -> str:
        return f"{self._path}, row {index}"


def _lay_out(path: Path, cache: Path) -> None:
    """Write the columns of strings and whole numbers as an Arrow file."""
    arrow, parquet = _arrow("pyarrow"), _arrow("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}") from None
    kinds = (arrow.types.is_string, arrow.types.is_large_string, arrow.types.is_integer)
    schema = file.schema_arrow
    names = [field.name for field in schema if any(kind(field.type) for kind in kinds)]
    with published(cache) as temporary, arrow.OSFile(str(temporary), "wb") as sink:
        batches = file.iter_batches(batch_size=65_536, columns=names)
        with arrow.ipc.new_file(sink, arrow.schema([schema.field(n) for n in names])) as writer:
            for batch in batches:
                writer.write_batch(batch)


def _arrow(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise UsageError("Parquet files need pyarrow: pip install 'cn-clip[data]'") from None


def _local(given: str) -> str:
    """Turn a web address into the name of the file that it was downloaded to."""
    if given.startswith("file://"):
        return unquote(urlsplit(given).path)
    if given.startswith(("http://", "https://")):
        return unquote(urlsplit(given).path).rpartition("/")[2]
    return given


def _column(
    table: Table,
    name: str,
    what: str,
    given: str | None,
    known: tuple[str, ...],
    *,
    optional: bool = False,
) -> str:
    if given is not None:
        if given in table.columns:
            return given
        raise DataError(f"{name}: no column {given!r}; it has {', '.join(table.columns)}")
    found = next((each for each in known if each in table.columns), None)
    if found is None and not optional:
        raise DataError(
            f"{name}: no column for the {what} ({', '.join(known)}) among "
            f"{', '.join(table.columns) or 'none'}; name it with ?{what}=COLUMN"
        )
    return found or ""

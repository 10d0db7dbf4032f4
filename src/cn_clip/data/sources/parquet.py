"""Parquet files as tables of pairs: columns of strings, lists of captions, and images as bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.data.sources.index_cache import cached
from cn_clip.data.sources.lines import read_at
from cn_clip.data.sources.table import Given, chosen
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.files import check_plain, mistaken
from cn_clip.text import path_text

_ROWS, _ROWS_OF_IMAGES = 65_536, 256  # that are in memory at once while the index is built
_EXPECTED = {
    "image": "paths, bytes, or struct<bytes, path>",
    "text": "strings, or lists of strings",
    "image_id": "strings or whole numbers",
    "text_id": "strings or whole numbers",
}
# What a column is laid out as.
_STRING, _NUMBER, _BYTES, _STRUCT, _LIST = "string", "number", "bytes", "struct", "list"
_FITTING = {
    "image": (_STRING, _BYTES, _STRUCT),
    "text": (_STRING, _LIST),
    "image_id": (_STRING, _NUMBER),
    "text_id": (_STRING, _NUMBER),
}


class Parquet:
    """``.parquet``, through a copy of its columns that can be read in any order.

    A Parquet file can only be read by groups of rows, often a million. The columns that pairs are
    made of are laid out once as an Arrow file, which is mapped: memory holds the pages in use. A
    list of texts makes a pair of each. Images may be paths, bytes, or Hugging Face's
    ``struct<bytes, path>``; one of bytes has the number of its row for an id.
    """

    def __init__(self, name: str, path: Path, given: Given) -> None:
        self._path = path
        arrow = _arrow("pyarrow")
        try:
            check_plain(path)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from None
        fields = _fields(path)
        kinds = {field.name: _kind(arrow, field.type) for field in fields}
        self.columns = chosen(
            name,
            [field.name for field in fields],
            given,
            lambda what, column: kinds[column] in _FITTING[what],
        )
        self._kinds: dict[str, str] = {}
        """Of each column that is used, by what it is used for."""
        for what, fitting in _FITTING.items():
            if column := getattr(self.columns, what):
                if kinds[column] not in fitting:
                    found = next(field.type for field in fields if field.name == column)
                    raise DataError(
                        f"{name}: the column {column} is {found}; expected {_EXPECTED[what]}. "
                        f"Convert it, or name another one with ?{what}=COLUMN"
                    )
                self._kinds[what] = kinds[column]
        laid = {what: (getattr(self.columns, what), kind) for what, kind in self._kinds.items()}
        mark = hashlib.blake2b(repr(laid).encode(), digest_size=4).hexdigest()

        def write(index: Path) -> None:
            _lay_out(path, laid, index)

        def read(index: Path) -> Path:
            self._open(index)
            return index

        self._index = cached(path, f"-{mark}.2.arrow", write, read)

    def _open(self, index: Path) -> None:
        arrow = _arrow("pyarrow")
        with arrow.memory_map(str(index)) as mapped:
            table = arrow.ipc.open_file(mapped).read_all()
        table.validate()
        self._table = table
        self._ends: npt.NDArray[np.int64] | None = None
        if self._kinds["text"] == _LIST:
            lengths = _arrow("pyarrow.compute").list_value_length(table.column("text"))
            counts = lengths.fill_null(0).to_numpy()
            # A row without a text is one all the same, which says so when it is read.
            self._ends = np.cumsum(np.maximum(counts, 1), dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_table", "_ends")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open(self._index)

    def __len__(self) -> int:
        return int(self._table.num_rows if self._ends is None else self._ends[-1:].sum())

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row, which = self._place(index)
        values = {what: self._value(what, row) for what in self._kinds if what != "image"}
        if self._ends is not None:
            texts = values["text"] or [None]
            values["text"] = texts[which]
            if which and values.get("text_id") is not None:
                values["text_id"] = f"{values['text_id']}#{which}"
        if self._kinds["image"] == _STRING:
            values["image"] = self._value("image", row)
        elif self._kinds["image"] == _STRUCT and not self._holds_bytes(row):
            values["image"] = self._value("image_path", row)
        else:
            values["image"] = str(row)
        return {getattr(self.columns, what): value for what, value in values.items()}

    def content(self, index: int) -> bytes | None:
        row, _ = self._place(index)
        if self._kinds["image"] == _STRING or not self._holds_bytes(row):
            return None
        content = self._value("image", row)
        assert isinstance(content, bytes)
        return content

    def where(self, index: int) -> str:
        return f"{path_text(self._path)}, row {self._place(index)[0]}"

    def _place(self, index: int) -> tuple[int, int]:
        """Return the row of a pair, and which of its texts it has."""
        if self._ends is None:
            return index, 0
        row = int(np.searchsorted(self._ends, index, "right"))
        return row, index - int(self._ends[row - 1]) if row else index

    def _holds_bytes(self, row: int) -> bool:
        return bool(self._table.column("image")[row].is_valid)

    def _value(self, column: str, row: int) -> Any:
        try:
            return self._table.column(column)[row].as_py()
        except (ValueError, OSError) as error:  # strings need not be UTF-8; see UnicodeDecodeError
            raise DataError(f"{path_text(self._path)}, row {row}: {error}") from None


def _fields(path: Path) -> list[Any]:
    parquet = _arrow("pyarrow.parquet")
    return list(_parsed(path, lambda: list(parquet.ParquetFile(path).schema_arrow)))


def _kind(arrow: Any, type: Any) -> str:
    """Return what a column of a type is laid out as; "" if it is of no use."""
    types = arrow.types

    def named(*names: str) -> bool:  # older versions of pyarrow know fewer types
        return any(getattr(types, f"is_{name}", lambda _: False)(type) for name in names)

    if named("dictionary"):
        inner = _kind(arrow, type.value_type)
        return inner if inner in (_STRING, _NUMBER) else ""
    if named("string", "large_string", "string_view"):
        return _STRING
    if named("integer"):
        return _NUMBER
    if named("binary", "large_binary", "binary_view", "fixed_size_binary"):
        return _BYTES
    if named("list", "large_list", "fixed_size_list", "list_view", "large_list_view"):
        return _LIST if _kind(arrow, type.value_type) == _STRING else ""
    if named("struct"):
        inside = {field.name: _kind(arrow, field.type) for field in type}
        fits = inside.get("bytes") == _BYTES and inside.get("path", _STRING) == _STRING
        return _STRUCT if fits else ""
    return ""


def _lay_out(path: Path, laid: Mapping[str, tuple[str, str]], index: Path) -> None:
    """Write the columns, each named by what it is used for, as an Arrow file."""
    arrow = _arrow("pyarrow")
    to = {
        _STRING: arrow.large_string(),
        _NUMBER: arrow.large_string(),  # ids are strings, and some are above 2 ** 63
        _BYTES: arrow.large_binary(),
        _STRUCT: arrow.large_binary(),
        _LIST: arrow.large_list(arrow.large_string()),
    }
    fields = [arrow.field(what, to[kind]) for what, (_, kind) in laid.items()]
    if laid["image"][1] == _STRUCT:
        fields.append(arrow.field("image_path", to[_STRING]))
    schema = arrow.schema(fields)
    with (
        arrow.OSFile(str(index), "wb") as sink,
        arrow.ipc.new_file(sink, schema) as writer,
    ):
        for columns in _batches(path, laid):
            arrays = [_cast(path, columns[field.name], field.type) for field in schema]
            writer.write_batch(arrow.record_batch(arrays, schema=schema))


def _batches(path: Path, laid: Mapping[str, tuple[str, str]]) -> Iterator[dict[str, Any]]:
    parquet = _arrow("pyarrow.parquet")
    names = list(dict.fromkeys(column for column, _ in laid.values()))
    size = _ROWS if laid["image"][1] == _STRING else _ROWS_OF_IMAGES
    file = _parsed(path, lambda: parquet.ParquetFile(path, buffer_size=1 << 20))
    batches = _parsed(path, lambda: file.iter_batches(batch_size=size, columns=names))
    while (batch := _parsed(path, lambda: next(batches, None))) is not None:
        columns = {what: batch.column(column) for what, (column, _) in laid.items()}
        if laid["image"][1] == _STRUCT:
            whole = columns["image"]
            inside = dict(zip([f.name for f in whole.type], whole.flatten(), strict=True))
            columns["image"] = inside["bytes"]
            columns["image_path"] = inside.get("path", _arrow("pyarrow").nulls(len(whole)))
        yield columns


def _cast(path: Path, column: Any, type: Any) -> Any:
    arrow = _arrow("pyarrow")
    try:
        return column.cast(type)
    except arrow.ArrowException:  # from views, in versions of pyarrow that do not know them well
        return _parsed(path, lambda: arrow.array(column.to_pylist(), type))


def _parsed(path: Path, read: Callable[[], Any]) -> Any:
    """Run a parser of pyarrow over the bytes of a file; damaged ones make it raise many kinds."""
    try:
        return read()
    except CNClipError:
        raise
    except Exception as error:
        if what := mistaken(read_at(path, 0, 32)):
            raise DataError(f"{path} is {what}") from None
        raise DataError(
            f"{path} is damaged, or no whole Parquet file: {error or type(error).__name__}"
        ) from None


def _arrow(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise UsageError("Parquet files need pyarrow: pip install 'cn-clip[data]'") from None

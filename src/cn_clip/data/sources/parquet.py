"""Parquet files as tables of pairs."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.data.sources.index_cache import cached_index
from cn_clip.data.sources.shard_file import FileState, LocalFile, ShardFile
from cn_clip.data.sources.table import PAIR, NamedColumns, choose_columns
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.files import HEAD, wrong_format
from cn_clip.install import install_command
from cn_clip.translation import N_, _, translate

_ROWS, _ROWS_OF_IMAGES = 65_536, 256  # in memory at once while the index is built
_BUFFER = 1 << 20  # bytes read at once
_EXPECTED = {
    "image": N_("paths, bytes, or struct<bytes, path>"),
    "text": N_("strings, or lists of strings"),
    "image_id": N_("strings or whole numbers"),
    "text_id": N_("strings or whole numbers"),
}
# Kinds of columns.
_STRING, _NUMBER, _BYTES, _STRUCT, _LIST = "string", "number", "bytes", "struct", "list"
_ACCEPTED = {
    "image": (_STRING, _BYTES, _STRUCT),
    "text": (_STRING, _LIST),
    "image_id": (_STRING, _NUMBER),
    "text_id": (_STRING, _NUMBER),
}


class Parquet:
    """``.parquet``, in random access through an index: a copy of the columns it uses.

    Parquet itself is read by row groups, often of a million rows. The index is an Arrow file, which
    is memory-mapped. A list of texts makes one pair per text. Images are paths, bytes, or Hugging
    Face's ``struct<bytes, path>``; the id of an image of bytes is its row number.
    """

    def __init__(
        self, name: str, file: ShardFile, named: NamedColumns, required: Sequence[str] = PAIR
    ) -> None:
        self._name = file.name
        arrow = import_pyarrow("pyarrow")
        state = file.state()
        fields = _read_fields(file, state)
        kinds = {field.name: _column_kind(arrow, field.type) for field in fields}
        self.columns = choose_columns(
            name,
            [field.name for field in fields],
            named,
            required,
            lambda role, column: kinds[column] in _ACCEPTED[role],
        )
        self._kinds: dict[str, str] = {}
        """Role (image, text, ...) -> kind of its column."""
        for role, accepted in _ACCEPTED.items():
            if column := getattr(self.columns, role):
                if kinds[column] not in accepted:
                    type = next(field.type for field in fields if field.name == column)
                    raise DataError(
                        _(
                            "{name}: the column {column} is {type}; expected {expected}. Convert "
                            "it, or name another one with ?{role}=COLUMN",
                            name=name,
                            column=column,
                            type=type,
                            expected=translate(_EXPECTED[role]),
                            role=role,
                        )
                    )
                self._kinds[role] = kinds[column]
        layout = {role: (getattr(self.columns, role), kind) for role, kind in self._kinds.items()}
        layout_digest = hashlib.blake2b(repr(layout).encode(), digest_size=4).hexdigest()

        def write(index: Path) -> None:
            _write_index(file, state, layout, index)

        def read(index: Path) -> Path:
            self._open(index)
            return index

        self._index = cached_index(file, state, f"-{layout_digest}.2.arrow", write, read)

    def _open(self, index: Path) -> None:
        arrow = import_pyarrow("pyarrow")
        with arrow.memory_map(str(index)) as mapped:
            table = arrow.ipc.open_file(mapped).read_all()
        table.validate()
        self._table = table
        self._ends: npt.NDArray[np.int64] | None = None
        if self._kinds.get("text") == _LIST:
            lengths = import_pyarrow("pyarrow.compute").list_value_length(table.column("text"))
            counts = lengths.fill_null(0).to_numpy()
            # A row without a text is a pair too: reading it reports the error.
            self._ends = np.cumsum(np.maximum(counts, 1), dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_table", "_ends")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open(self._index)

    def __len__(self) -> int:
        return int(self._table.num_rows if self._ends is None else self._ends[-1:].sum())

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row, text_number = self._locate(index)
        values = {role: self._value(role, row) for role in self._kinds if role != "image"}
        if self._ends is not None:
            texts = values["text"] or [None]
            values["text"] = texts[text_number]
            if text_number and values.get("text_id") is not None:
                values["text_id"] = f"{values['text_id']}#{text_number}"
        image = self._kinds.get("image")
        if image == _STRING:
            values["image"] = self._value("image", row)
        elif image == _STRUCT and not self._holds_bytes(row):
            values["image"] = self._value("image_path", row)
        elif image is not None:
            values["image"] = str(row)
        return {getattr(self.columns, role): value for role, value in values.items()}

    def content(self, index: int) -> bytes | None:
        row, _ = self._locate(index)
        if self._kinds.get("image") in (None, _STRING) or not self._holds_bytes(row):
            return None
        content = self._value("image", row)
        assert isinstance(content, bytes)
        return content

    def where(self, index: int) -> str:
        return _("{path}, row {row}", path=self._name, row=self._locate(index)[0])

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the row of a pair, and the number of its text in that row."""
        if self._ends is None:
            return index, 0
        row = int(np.searchsorted(self._ends, index, "right"))
        return row, index - int(self._ends[row - 1]) if row else index

    def _holds_bytes(self, row: int) -> bool:
        return bool(self._table.column("image")[row].is_valid)

    def _value(self, column: str, row: int) -> Any:
        try:
            return self._table.column(column)[row].as_py()
        except (ValueError, OSError) as error:  # including UnicodeDecodeError
            raise DataError(
                _("{path}, row {row}: {error}", path=self._name, row=row, error=error)
            ) from None


def _read_fields(file: ShardFile, state: FileState) -> list[Any]:
    with _opened(file, state) as parquet:
        return list(_map_parse_errors(file, lambda: list(parquet.schema_arrow)))


@contextmanager
def _opened(file: ShardFile, state: FileState) -> Iterator[Any]:
    """Open a file with pyarrow, which reads a file on this disk itself."""
    parquet = import_pyarrow("pyarrow.parquet")
    with ExitStack() as stack:
        source: Any = file.path if isinstance(file, LocalFile) else None
        if source is None:
            source = stack.enter_context(io.BufferedReader(file.open(state), _BUFFER))  # type: ignore[type-var]
        yield _map_parse_errors(file, lambda: parquet.ParquetFile(source, buffer_size=_BUFFER))


def _column_kind(arrow: Any, type: Any) -> str:
    """Return the kind of a column of an Arrow type; "" if it is not supported."""
    types = arrow.types

    def is_any(*names: str) -> bool:  # older versions of pyarrow have fewer types
        return any(getattr(types, f"is_{name}", lambda _: False)(type) for name in names)

    if is_any("dictionary"):
        inner = _column_kind(arrow, type.value_type)
        return inner if inner in (_STRING, _NUMBER) else ""
    if is_any("string", "large_string", "string_view"):
        return _STRING
    if is_any("integer"):
        return _NUMBER
    if is_any("binary", "large_binary", "binary_view", "fixed_size_binary"):
        return _BYTES
    if is_any("list", "large_list", "fixed_size_list", "list_view", "large_list_view"):
        return _LIST if _column_kind(arrow, type.value_type) == _STRING else ""
    if is_any("struct"):
        members = {field.name: _column_kind(arrow, field.type) for field in type}
        fits = members.get("bytes") == _BYTES and members.get("path", _STRING) == _STRING
        return _STRUCT if fits else ""
    return ""


def _write_index(
    file: ShardFile, state: FileState, layout: Mapping[str, tuple[str, str]], index: Path
) -> None:
    """Write the columns, named by their roles, as an Arrow file."""
    arrow = import_pyarrow("pyarrow")
    types = {
        _STRING: arrow.large_string(),
        _NUMBER: arrow.large_string(),  # ids are strings, and some are above 2 ** 63
        _BYTES: arrow.large_binary(),
        _STRUCT: arrow.large_binary(),
        _LIST: arrow.large_list(arrow.large_string()),
    }
    fields = [arrow.field(role, types[kind]) for role, (_, kind) in layout.items()]
    if _image_kind(layout) == _STRUCT:
        fields.append(arrow.field("image_path", types[_STRING]))
    schema = arrow.schema(fields)
    with (
        arrow.OSFile(str(index), "wb") as sink,
        arrow.ipc.new_file(sink, schema) as writer,
    ):
        for columns in _batches(file, state, layout):
            arrays = [_cast(file, columns[field.name], field.type) for field in schema]
            writer.write_batch(arrow.record_batch(arrays, schema=schema))


def _batches(
    file: ShardFile, state: FileState, layout: Mapping[str, tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    names = list(dict.fromkeys(column for column, _ in layout.values()))
    size = _ROWS if _image_kind(layout) in (None, _STRING) else _ROWS_OF_IMAGES
    with _opened(file, state) as parquet:
        batches = _map_parse_errors(
            file, lambda: parquet.iter_batches(batch_size=size, columns=names)
        )
        while (batch := _map_parse_errors(file, lambda: next(batches, None))) is not None:
            columns = {role: batch.column(column) for role, (column, _) in layout.items()}
            if _image_kind(layout) == _STRUCT:
                structs = columns["image"]
                members = dict(zip([f.name for f in structs.type], structs.flatten(), strict=True))
                columns["image"] = members["bytes"]
                columns["image_path"] = members.get(
                    "path", import_pyarrow("pyarrow").nulls(len(structs))
                )
            yield columns


def _image_kind(layout: Mapping[str, tuple[str, str]]) -> str | None:
    return layout["image"][1] if "image" in layout else None


def _cast(file: ShardFile, column: Any, type: Any) -> Any:
    arrow = import_pyarrow("pyarrow")
    try:
        return column.cast(type)
    except arrow.ArrowException:  # some versions of pyarrow cannot cast views
        return _map_parse_errors(file, lambda: arrow.array(column.to_pylist(), type))


def _map_parse_errors(file: ShardFile, read: Callable[[], Any]) -> Any:
    """Run a pyarrow parser; on a damaged file it raises many kinds of errors."""
    try:
        return read()
    except CNClipError:
        raise
    except Exception as error:
        if reason := wrong_format(file.read(file.state(), 0, HEAD)):
            raise DataError(_("{path} is {reason}", path=file.name, reason=reason)) from None
        raise DataError(
            _(
                "{path} is damaged or not a Parquet file: {error}",
                path=file.name,
                error=error or type(error).__name__,
            )
        ) from None


def import_pyarrow(name: str) -> Any:
    """Return the module ``pyarrow``, or one of its own.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise UsageError(
            _("Parquet files need pyarrow: {command}", command=install_command("data"))
        ) from None

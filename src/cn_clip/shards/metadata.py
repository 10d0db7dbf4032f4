"""What is known of single images of shards: rows of Parquet files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cn_clip.data.sources.parquet import import_pyarrow
from cn_clip.errors import CNClipError, DataError
from cn_clip.files import check_regular
from cn_clip.shards.folder import ShardFolder, shards_and_rows
from cn_clip.text import path_text, valid_text
from cn_clip.translation import _

_PATHS = ("image_path", "url", "path", "key", "id")
_ITEMS = ("id", "key")
_CAPTION = "caption"
_NUMBERS = ("width", "height")
_OPEN_FILES = 64


@dataclass(frozen=True, slots=True)
class Facts:
    """What a row says: where the image is, or the nearest that is known; its caption; the id that
    it had where it comes from."""

    path: str
    caption: str | None = None
    width: int = 0
    height: int = 0
    item: str = ""


class MetadataReader:
    """Reads rows of the metadata by ids. Thread-safe; the last files stay open."""

    def __init__(self, folder: ShardFolder) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._files: OrderedDict[int, Any] = OrderedDict()

    def read(self, ids: Sequence[int]) -> dict[int, Facts]:
        """Return what is known of each id; an id without a row is left out.

        Raises:
            UsageError: pyarrow is missing.
            DataError: a file is missing or damaged.
        """
        found: dict[int, Facts] = {}
        shards, rows = shards_and_rows(np.array(ids, np.int64))
        for shard in dict.fromkeys(shards.tolist()):
            if shard not in self._folder.names:
                continue
            wanted = {
                row: image
                for row, image, own in zip(rows.tolist(), ids, shards.tolist(), strict=True)
                if own == shard
            }
            for row, facts in self._of_shard(shard, sorted(wanted)).items():
                found[wanted[row]] = facts
        return found

    def _of_shard(self, shard: int, rows: list[int]) -> dict[int, Facts]:
        with _damage(self._folder.metadata_path(shard)), self._lock:  # not made for threads
            return _facts_of_rows(self._opened(shard), rows)

    def _opened(self, shard: int) -> Any:
        file = self._files.pop(shard, None)
        if file is None:
            path = self._folder.metadata_path(shard)
            check_regular(path)
            file = import_pyarrow("pyarrow.parquet").ParquetFile(path)
        self._files[shard] = file
        while len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return file


def facts_in_batches(folder: ShardFolder, shard: int, size: int) -> Iterator[list[Facts]]:
    """Yield what all rows of a shard say, in order, ``size`` at a time.

    Raises:
        UsageError: pyarrow is missing.
        DataError: the file is missing or damaged.
    """
    path = folder.metadata_path(shard)
    with _damage(path):
        check_regular(path)
        file = import_pyarrow("pyarrow.parquet").ParquetFile(path)
        batches = file.iter_batches(size, columns=_columns(file))
    waiting: list[Facts] = []
    while True:
        with _damage(path):
            batch = next(batches, None)
            rows = [] if batch is None else [_facts(values) for values in batch.to_pylist()]
        waiting += rows  # batches end at row groups
        while len(waiting) >= size or (batch is None and waiting):
            yield waiting[:size]
            del waiting[:size]
        if batch is None:
            return


def check_rows(folder: ShardFolder, shard: int, agree: bool) -> None:
    """Raise a ``DataError`` if the files of a shard have other numbers of rows."""
    if not agree:
        raise DataError(
            _(
                "shard {shard} of {path} has other numbers of vectors and of rows in metadata; "
                "see: cn-clip bulk verify",
                shard=shard,
                path=path_text(folder.path),
            )
        )


def _facts_of_rows(file: Any, rows: list[int]) -> dict[int, Facts]:
    """Return what rows say; only the groups that have them are read."""
    found: dict[int, Facts] = {}
    first = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        inside = [row for row in rows if first <= row < first + count]
        if inside:
            table = file.read_row_group(group, columns=_columns(file))
            table = table.take([row - first for row in inside]).to_pylist()
            found |= {row: _facts(values) for row, values in zip(inside, table, strict=True)}
        first += count
    return found


def _columns(file: Any) -> list[str]:
    names = file.schema_arrow.names
    return [name for name in (*_PATHS, _CAPTION, *_NUMBERS) if name in names]


def _facts(values: dict[str, Any]) -> Facts:
    path = next((values[name] for name in _PATHS if values.get(name) is not None), "")
    item = next((values[name] for name in _ITEMS if values.get(name) is not None), path)
    caption = values.get(_CAPTION)
    width, height = (number if type(number := values.get(name)) is int else 0 for name in _NUMBERS)
    caption = valid_text(caption) if isinstance(caption, str) else None
    return Facts(valid_text(str(path)), caption, width, height, valid_text(str(item)))


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises on a damaged file into a ``DataError``."""
    try:
        yield
    except CNClipError:
        raise
    # OSError, ArrowInvalid, KeyError, TypeError, ...: nearly every kind.
    except Exception as error:
        raise DataError(
            _("{path} is not Parquet: {error}", path=path_text(path), error=error)
        ) from None

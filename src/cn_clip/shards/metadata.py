"""What is known of single images of shards: rows of Parquet files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from cn_clip.errors import DataError, UsageError
from cn_clip.files import check_regular
from cn_clip.shards.folder import ShardFolder, shards_and_rows
from cn_clip.text import path_text, valid_text
from cn_clip.translation import _

_PATHS = ("image_path", "url", "path", "key", "id")
_CAPTION = "caption"
_NUMBERS = ("width", "height")
_OPEN_FILES = 64


@dataclass(frozen=True, slots=True)
class Facts:
    """What a row says: where the image is, or the nearest that is known; and its caption."""

    path: str
    caption: str | None = None
    width: int = 0
    height: int = 0


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
        path = self._folder.metadata_path(shard)
        try:
            with self._lock:  # a ParquetFile is not made for threads
                return _facts(self._opened(shard), rows)
        except UsageError:
            raise
        # pyarrow raises many kinds on damaged files: OSError, ArrowInvalid, KeyError, TypeError, ...
        except Exception as error:
            raise DataError(
                _("{path} is not Parquet: {error}", path=path_text(path), error=error)
            ) from None

    def _opened(self, shard: int) -> Any:
        file = self._files.pop(shard, None)
        if file is None:
            path = self._folder.metadata_path(shard)
            check_regular(path)
            file = parquet().ParquetFile(path)
        self._files[shard] = file
        while len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return file


def parquet() -> Any:
    """Return the module pyarrow.parquet.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module("pyarrow.parquet")
    except ImportError:
        raise UsageError(
            _("the metadata of shards needs pyarrow: pip install 'cn-clip[data]'")
        ) from None


def _facts(file: Any, rows: list[int]) -> dict[int, Facts]:
    """Return what rows say; only the groups that have them are read."""
    names = file.schema_arrow.names
    path = next((name for name in _PATHS if name in names), None)
    columns = [name for name in (path, _CAPTION, *_NUMBERS) if name in names]
    found: dict[int, Facts] = {}
    first = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        inside = [row for row in rows if first <= row < first + count]
        if inside:
            table = file.read_row_group(group, columns=columns)
            table = table.take([row - first for row in inside]).to_pylist()
            for row, values in zip(inside, table, strict=True):
                found[row] = Facts(
                    valid_text(str(values.get(path))),
                    valid_text(caption) if isinstance(caption := values.get(_CAPTION), str) else None,
                    *(number if type(number := values.get(name)) is int else 0 for name in _NUMBERS),
                )
        first += count
    return found

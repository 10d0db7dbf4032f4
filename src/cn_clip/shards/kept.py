"""The list of the images of shards that are kept, which training and later runs read.

One JSON object per line: ``id`` in the shards, ``image`` (its path, or ``KIND:PATH#ID`` of a
source), ``text`` and ``image_id``. So the list is a source of pairs, ``jsonl:KEPT.jsonl``, for
`cn-clip train` and `cn-clip data`, and a list of images for `cn-clip embed` and `cn-clip bulk
plan`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.data.sources.base import Source
from cn_clip.data.sources.folder import Folder
from cn_clip.data.sources.lines import line_end, stream_lines
from cn_clip.data.sources.open import parts_of
from cn_clip.data.sources.remote import is_remote
from cn_clip.errors import DataError, UsageError
from cn_clip.outputs import claim, own_file, reads_as
from cn_clip.publish import atomic_file, map_write_errors
from cn_clip.shards.folder import Rows, ShardFolder, ids_of
from cn_clip.shards.metadata import check_rows, facts_in_batches
from cn_clip.text import path_text
from cn_clip.translation import _

_TOGETHER = 4096  # rows
_DIGEST = np.dtype("S16")  # so wide that no two of 10^9 images have the same
_IS_LIST = reads_as(re.compile(rb'\{"id": \d+, "image": "'), b"}\n")

Mask = npt.NDArray[np.bool_]


def claim_kept(
    out: str, command: str, *, inputs: Iterable[str | Path], overwrite: bool = False
) -> Path:
    """Check that a list may be written to ``out``, without touching it. Return it as a path.

    Raises:
        UsageError: the suffix is not .jsonl, or as ``outputs.claim``.
    """
    if Path(out).suffix != ".jsonl":
        raise UsageError(_("--out is {out}; give X.jsonl", out=out))
    return claim(out, own_file(command, _IS_LIST), inputs=inputs, overwrite=overwrite)


def write_kept(
    folder: ShardFolder,
    out: Path,
    masks: Iterable[tuple[int, Mask]],
    *,
    tick: Callable[[int], None] = lambda rows: None,
) -> int:
    """Write the list; return the number of kept images.

    Args:
        folder: the shards.
        out: from ``claim_kept``.
        masks: for each shard in order, which rows (N,) are kept.
        tick: called with the number of rows just done.

    Raises:
        DataError: a shard is damaged.
        CNClipError: the disk is full; an existing list stays unchanged.
    """
    kept = 0
    with (
        map_write_errors(out),
        atomic_file(out) as path,
        path.open("w", encoding="utf-8") as stream,
    ):
        for shard, mask in masks:
            done = 0
            for facts in facts_in_batches(folder, shard, _TOGETHER):
                rows = np.flatnonzero(mask[done : done + len(facts)])
                ids = ids_of(shard, rows + done).tolist()
                for image, row in zip(ids, rows.tolist(), strict=True):
                    fact = facts[row]
                    record = {
                        "id": image,
                        "image": fact.path,
                        "text": fact.caption or "",
                        "image_id": fact.item,
                    }
                    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                kept += len(rows)
                done += len(facts)
                tick(len(facts))
            check_rows(folder, shard, done == len(mask))
    return kept


def read_kept(path: Path) -> Rows:
    """Return the ids (N,) in a list, sorted; 8 bytes for each image.

    Raises:
        DataError: the file is missing or no such list.
    """
    return _values(path, "id", _checked_id, np.dtype(np.int64))


def _values(
    path: Path, key: str, convert: Callable[[Any], Any], dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """Return one value of each line, sorted. Errors as ``read_kept``."""
    try:
        lines = (json.loads(line)[key] for line in _lines(path))
        values = np.fromiter((convert(value) for value in lines), dtype)
    except OSError as error:
        raise DataError(
            _("{path} cannot be read: {reason}", path=path_text(path), reason=error.strerror)
        ) from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise DataError(
            _(
                "{path} was not written by `cn-clip bulk dedupe` or `cn-clip bulk filter`",
                path=path_text(path),
            )
        ) from None
    return np.sort(values)


def rows_left_out(path: Path, source: Source) -> Rows:
    """Return the indexes (N,) of the pairs of a source whose images are not in a list.

    The list is of shards that were embedded from this source: ``image`` is ``KIND:PATH#ID`` there,
    and the path of the image for a folder.
    Memory: 16 bytes for each image of the list.

    Raises:
        DataError: the file is no such list, or has no image of the source.
    """
    kept = _values(path, "image", _digest, _DIGEST)
    left_out, first = [np.empty(0, np.int64)], 0
    for part in parts_of(source):
        digests = np.fromiter(map(_digest, _labels(part)), _DIGEST, len(part))
        found = np.isin(digests, kept)
        left_out.append(first + np.flatnonzero(~found))
        first += len(part)
    indexes = np.concatenate(left_out)
    if len(indexes) == first:
        raise DataError(
            _(
                "{path} has no image of {source}; give the source that the shards were embedded "
                "from",
                path=path_text(path),
                source=source.name,
            )
        )
    return indexes


def mask_of(shard: int, count: int, kept: Rows | None) -> Mask:
    """Return which rows (count,) of a shard are in a list; all without one."""
    if kept is None:
        return np.ones(count, np.bool_)
    mask = np.zeros(count, np.bool_)
    first = int(ids_of(shard, np.zeros(1, np.int64))[0])
    start, end = np.searchsorted(kept, [first, first + count])
    mask[kept[start:end] - first] = True
    return mask


def _lines(path: Path) -> Iterator[bytes]:
    return stream_lines(path, 0, line_end(path))


def _checked_id(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(value)
    return value


def _digest(label: Any) -> bytes:
    if not isinstance(label, str):
        raise ValueError(label)
    return hashlib.blake2b(label.encode(), digest_size=_DIGEST.itemsize).digest()


def _labels(part: Source) -> Iterator[str]:
    """Yield what ``bulk`` calls the image of each row."""
    if isinstance(part, Folder):
        for row in range(len(part)):
            yield path_text(os.path.abspath(part.image_path(row)))
        return
    place = _place(part)
    for row in range(len(part)):
        yield f"{place}#{_image_id(part, row)}"


def _place(part: Source) -> str:
    """Return ``KIND:PATH`` of one file of a source, its path absolute."""
    kind, _colon, path = part.name.partition("?")[0].partition(":")
    return f"{kind}:{path if is_remote(path) else os.path.abspath(path)}"


def _image_id(part: Source, row: int) -> str:
    try:
        return part.row(row).image_id
    except DataError:  # reported by what reads the row
        return ""

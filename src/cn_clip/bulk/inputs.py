"""The inputs of a plan: listed as lines when it is made, and read line by line in a shard."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from cn_clip.bulk.plan import Embed
from cn_clip.data.curate.grouping import RowGroups, group_rows
from cn_clip.data.process_map import Progress, no_progress
from cn_clip.data.sources.base import Row, Source
from cn_clip.data.sources.folder import Folder
from cn_clip.data.sources.open import SOURCE_OPTIONS
from cn_clip.data.sources.parts import Part, parts_in
from cn_clip.data.sources.remote import is_remote
from cn_clip.data.sources.row_index import index_of
from cn_clip.data.sources.row_keys import image_key, unreadable_key
from cn_clip.data.sources.tar import Tar
from cn_clip.embeddings.inputs import images_below, read_images
from cn_clip.embeddings.item import Item, file_stamp
from cn_clip.errors import DataError, UnavailableError, UsageError
from cn_clip.files import as_path
from cn_clip.text import path_text
from cn_clip.translation import _

_READ_AHEAD = 256  # images of a remote shard
_TABLES = (".tar", ".csv", ".tsv", ".parquet")  # files that are sources of pairs
Content = bytes | Path


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a shard: an image, its texts, or both.

    Attributes:
        id: of its row: the path of the image, or ``URI#ID`` of one in a file of a source, with
            ``#ID`` of its text if texts are embedded; or the id that a list gives.
        label: path of the image, or ``URI#ID``.
        own_id: of the image in its source.
        text: its texts, one per line; empty without any.
        image: equal inputs of one shard have the same image, which is embedded once.
        read: returns the path or the bytes of the image.

            Raises:
                UnavailableError: its file as a whole cannot be read.
                DataError: it is missing or damaged.
    """

    id: str
    label: str
    own_id: str
    text: str
    image: str
    read: Callable[[], Content]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An input whose row cannot be read."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the file of inputs, and how many inputs it has."""

    text: bytes
    inputs: int


# Listing, when a plan is made


def is_pairs(given: str) -> bool:
    """Return whether inputs are a source of pairs: ``KIND:PATH``, a URL, or a file of pairs; else
    they are images, as of ``cn-clip embed images``."""
    kind = given.partition(":")[0]
    if is_remote(given) or (kind in SOURCE_OPTIONS and not os.path.exists(given)):
        return True
    return given.partition("?")[0].lower().endswith(_TABLES) and not os.path.isdir(given)


def list_lines(
    given: str, embed: Embed, *, workers: int = 0, on_progress: Progress = no_progress
) -> Iterator[Line]:
    """Yield the lines of a source.

    Raises:
        UsageError, DataError, ImageError: the source does not exist, or is not valid.
    """
    if is_pairs(given):
        if given.startswith("folder:"):
            yield from _captioned_lines(given, embed)
            return
        for part, source in parts_in(given, workers=workers, on_progress=on_progress):
            count = len(_groups(source)) if embed == "images" else part.pairs
            yield Line(_dumped(part.to_json() | {"inputs": count}), count)
        return
    if embed != "images":
        raise UsageError(
            _(
                "{given} is images without texts; give a source of pairs, such as "
                "folder:{given}, for --embed {embed}",
                given=given,
                embed=embed,
            )
        )
    items = images_below(as_path(given)) if os.path.isdir(given) else read_images([given])
    for item in items:
        yield Line(_item_line(item), 1)


def _captioned_lines(given: str, embed: Embed) -> Iterator[Line]:
    """Yield the images of a folder with their captions, which are files beside them."""
    for _part, source in parts_in(given):
        assert isinstance(source, Folder)
        groups = _groups(source) if embed == "images" else _each(len(source))
        for group in groups:
            try:
                rows = [source.row(index) for index in group.tolist()]
            except DataError as error:
                warnings.warn(_("{error}; it is left out", error=error), stacklevel=2)
                continue
            path = Path(os.path.abspath(source.image_path(int(group[0]))))
            item = Item(_row_id(path_text(path), rows[0], embed), path, file_stamp(path), "")
            text = "\n".join(row.text for row in rows)
            yield Line(_item_line(item, rows[0].image_id, text), 1)


def _item_line(item: Item, *more: str) -> bytes:
    """Return the line of an image: id, path, stamp; then its own id and text, if it has them."""
    assert not isinstance(item.content, bytes)
    return _dumped([str(item.id), os.path.abspath(item.content), item.stamp, *more])


def _row_id(label: str, row: Row, embed: Embed) -> str:
    """Return a unique id of a row of pairs."""
    same = embed == "images" or row.text_id == row.image_id
    return label if same else f"{label}#{row.text_id}"


def _dumped(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


# Reading, in a shard


def inputs_of(
    lines: Sequence[bytes], skip: int, count: int, embed: Embed
) -> Iterator[Input | Unreadable]:
    """Yield the ``count`` inputs of a shard, after the first ``skip`` of its first line.

    Raises:
        UnavailableError: a file of a source is missing or has changed.
        DataError: a line is not valid, or a file is damaged.
    """
    for line in lines:
        values = json.loads(line)
        if isinstance(values, list):
            yield _listed(*values)
            count -= 1
            continue
        taken = min(count, values["inputs"] - skip)
        yield from _of_part(line, embed, skip, skip + taken)
        skip, count = 0, count - taken


def _listed(id: str, path: str, stamp: str, own_id: str | None = None, text: str = "") -> Input:
    def read() -> Content:
        now = file_stamp(Path(path))
        if now == "missing":
            raise DataError(_("{path}: no such file", path=path_text(path)))
        if now != stamp:
            raise DataError(_("{path} has changed since it was planned", path=path_text(path)))
        return Path(path)

    return Input(id, path_text(path), id if own_id is None else own_id, text, path, read)


def _of_part(line: bytes, embed: Embed, first: int, stop: int) -> Iterator[Input | Unreadable]:
    part, source = _opened(line)
    groups = _groups_of(line) if embed == "images" else _each(part.pairs)
    for number in range(first, stop):
        if isinstance(source, Tar) and source.is_remote and not (number - first) % _READ_AHEAD:
            ahead = groups[number], groups[min(stop, number + _READ_AHEAD) - 1]
            source.read_ahead(int(ahead[0][0]), int(ahead[1][-1]) + 1)
        yield _of_rows(part, source, groups[number].tolist(), embed)


def _of_rows(part: Part, source: Source, indexes: list[int], embed: Embed) -> Input | Unreadable:
    try:
        rows = [source.row(index) for index in indexes]
    except UnavailableError:
        raise
    except DataError as error:
        return Unreadable(source.where(indexes[0]), str(error))
    own_id = rows[0].image_id
    label = path_text(f"{part.kind}:{part.path}#{own_id}")
    return Input(
        _row_id(label, rows[0], embed),
        label,
        own_id,
        "\n".join(row.text for row in rows),
        f"{part.path}\0{own_id}",
        partial(source.image, indexes[0]),
    )


@lru_cache(maxsize=4)
def _opened(line: bytes) -> tuple[Part, Source]:
    part = Part.from_json(json.loads(line))
    return part, part.open()


@lru_cache(maxsize=4)
def _groups_of(line: bytes) -> RowGroups:
    return _groups(_opened(line)[1])


def _groups(source: Source) -> RowGroups:
    """Return the rows of each image of one file, in the order of their first rows."""
    index = index_of(source)
    if index is not None:
        keys = index.image_keys(0, 0)
    else:
        numbers = range(len(source))
        keys = np.fromiter((_key(source, number) for number in numbers), np.uint64, len(source))
    return group_rows(np.arange(len(source)), keys)


def _key(source: Source, index: int) -> int:
    try:
        return image_key(0, source.row(index).image_id)
    except UnavailableError:
        raise
    except DataError:
        return unreadable_key(index)


def _each(count: int) -> RowGroups:
    return RowGroups(np.arange(count), np.arange(count + 1))

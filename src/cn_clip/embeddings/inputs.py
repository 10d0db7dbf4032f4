"""Read images and texts to embed from folders, globs, text files, JSONL and TSV, one at a time."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cn_clip.data.sources.lines import json_object, line_end, stream_lines
from cn_clip.data.sources.lmdb import is_lmdb, lmdb_images
from cn_clip.data.sources.official import decode_base64, parse_id
from cn_clip.errors import DataError, UsageError
from cn_clip.files import MAX_TEXT, as_path, resolve_in
from cn_clip.image.decode import SUFFIXES, find_images
from cn_clip.image.limits import MAX_BASE64
from cn_clip.text import path_text
from cn_clip.translation import _

Kind = Literal["images", "texts"]


@dataclass(frozen=True, slots=True)
class Item:
    """One image or text.

    Attributes:
        content: the path of an image, its bytes, or a text.
        stamp: changes when the content changes.
        where: location for messages.
    """

    id: str | int
    content: str | Path | bytes
    stamp: str
    where: str


def read_images(inputs: Sequence[str]) -> Iterator[Item]:
    """Yield the images of folders, globs, image files, ``.txt`` (one path per line), ``.jsonl``
    (``{"image": path, "image_id": id}``), the official ``.tsv`` (id, tab, base64) and the official
    LMDB ``imgs``.

    Paths in a file are relative to its folder. The id of an image given by its path is that path.

    Raises:
        ImageError: a path does not exist, or a folder or glob holds no image.
        UsageError: a line is invalid.
        DataError: a line is too long, or the file cannot be read.
    """
    for given in inputs:
        path = as_path(given)
        suffix = path.suffix.lower()
        if suffix == ".tsv" and path.is_file():
            yield from _tsv(path)
        elif is_lmdb(path):
            for image_id, content, where in lmdb_images(path):
                yield Item(parse_id(path_text(image_id)), content, _crc(content), where)
        elif suffix in (".jsonl", ".json") and path.is_file():
            yield from (_json_item(line, path, where) for where, line in _json_lines(path))
        elif suffix == ".txt" and path.is_file():
            for where, raw in _lines(path):
                line = _listed_path(path, raw, where)
                yield _file_item(resolve_in(path.parent, line), line, where)
        elif path.is_file() and suffix not in SUFFIXES:
            raise UsageError(
                _(
                    "{given} is neither an image nor a list of images (.txt, .jsonl, .tsv); "
                    "convert it to JPEG or PNG, or rename it",
                    given=given,
                )
            )
        else:
            yield from (_file_item(file, str(file), str(file)) for file in find_images([given]))


def read_texts(inputs: Sequence[str]) -> Iterator[Item]:
    """Yield the texts of ``.txt`` files (one text per line, the line number as its id) and
    ``.jsonl`` files (``{"text": ..., "text_id": ...}``, as the official ``*_texts.jsonl``).

    Raises:
        UsageError: a file is missing or of another format, or a line is invalid.
        DataError: a line is too long, or the file cannot be read.
    """
    several = len(inputs) > 1
    for given in inputs:
        path = as_path(given)
        if not path.is_file():
            raise UsageError(
                _("no such file: {given}; texts come from .txt and .jsonl files", given=given)
            )
        if path.suffix.lower() in (".jsonl", ".json"):
            for where, values in _json_lines(path):
                text = values.get("text")
                if not isinstance(text, str):
                    raise UsageError(
                        _('{where}: expected {{"text_id": 1, "text": "..."}}', where=where)
                    )
                yield Item(_id(values, "text_id", where), text, _crc(text.encode()), where)
        elif path.suffix.lower() in (".txt", ""):
            for number, (where, raw) in enumerate(_lines(path), 1):
                name = f"{path_text(path)}:{number}" if several else number
                line = _decoded(raw, where)
                yield Item(name, line, _crc(line.encode()), where)
        else:
            raise UsageError(
                _(
                    "{given} is not a list of texts (.txt, .jsonl); rename or convert it",
                    given=given,
                )
            )


def _tsv(path: Path) -> Iterator[Item]:
    for where, raw in _lines(path, MAX_BASE64):
        name, tab, encoded = raw.partition(b"\t")
        if not tab or not name:
            start = raw[:40].decode(errors="replace")
            raise UsageError(
                _(
                    "{where}: expected an id, a tab and base64, found {start!r}",
                    where=where,
                    start=start,
                )
            )
        try:
            content = decode_base64(encoded, where)
        except DataError:
            content = b""  # counted as unreadable when it is decoded
        yield Item(parse_id(_decoded(name, where)), content, _crc(content), where)


def _json_item(values: dict[str, Any], path: Path, where: str) -> Item:
    given = next((values[k] for k in ("image", "image_path", "path") if k in values), None)
    if not isinstance(given, str):
        raise UsageError(_('{where}: expected {{"image": "path", "image_id": 1}}', where=where))
    item = _file_item(resolve_in(path.parent, given), given, where)
    if "image_id" not in values:
        return item
    return Item(_id(values, "image_id", where), item.content, item.stamp, where)


def _file_item(path: Path, name: str, where: str) -> Item:
    try:
        status = path.stat()
        stamp = f"{status.st_size}-{status.st_mtime_ns}"
    except (OSError, ValueError):
        stamp = "missing"  # reported when the image is read
    return Item(path_text(name), path, stamp, path_text(where))


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, raw in _lines(path):
        yield where, json_object(_decoded(raw, where), where, kind=UsageError)


def _lines(path: Path, limit: int = MAX_TEXT) -> Iterator[tuple[str, bytes]]:
    """Yield ("FILE, line N", line) for the lines that are not empty."""
    try:
        for number, raw in enumerate(stream_lines(path, 0, line_end(path), limit), 1):
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if line.strip():
                yield (
                    _("{path}, line {number}", path=path_text(path), number=number),
                    line.strip(b"\r\n"),
                )
    except OSError as error:
        raise DataError(
            _("{path} cannot be read: {reason}", path=path, reason=error.strerror)
        ) from None


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise UsageError(_("{where} is not UTF-8; save the file as UTF-8", where=where)) from None


def _listed_path(path: Path, raw: bytes, where: str) -> str:
    """Return the path in a line of a list; an existing file's name need not be UTF-8."""
    name = os.fsdecode(raw)
    return name if os.path.lexists(resolve_in(path.parent, name)) else _decoded(raw, where)


def _id(values: dict[str, Any], key: str, where: str) -> str | int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(
            _(
                "{where}: {key} is {value!r}; give a number or a string",
                where=where,
                key=key,
                value=value,
            )
        )
    return value


def _crc(content: bytes) -> str:
    return f"{len(content)}-{zlib.crc32(content):08x}"

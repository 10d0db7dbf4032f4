"""Images and texts to embed, one at a time, out of folders, globs, text files, JSONL and TSV."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cn_clip.data.sources.lines import line_end, stream_lines
from cn_clip.data.sources.official import decoded_base64, plain_id
from cn_clip.errors import DataError, UsageError
from cn_clip.files import MAX_FILE, MAX_TEXT, as_path, beside
from cn_clip.image.decode import SUFFIXES, find_images
from cn_clip.text import path_text, read_json

Kind = Literal["images", "texts"]


@dataclass(frozen=True, slots=True)
class Item:
    """One picture or text.

    ``content`` is a path, the bytes of a picture, or a text; ``stamp`` changes when it does;
    ``where`` names its place for messages.
    """

    id: str | int
    content: str | Path | bytes
    stamp: str
    where: str


def read_images(inputs: Sequence[str]) -> Iterator[Item]:
    """Yield the images of folders, globs, image files, ``.txt`` (a path a line), ``.jsonl``
    (``{"image": path, "image_id": id}``) and the official ``.tsv`` (id, tab, base64).

    Paths inside a file start at its folder. The id of an image given by its path is that path.

    Raises:
        ImageError: a path does not exist, or a folder or glob holds no image.
        UsageError: a line cannot be understood; it is named with its number.
        DataError: a line is too long, or the file cannot be read.
    """
    for given in inputs:
        path = as_path(given)
        suffix = path.suffix.lower()
        if suffix == ".tsv" and path.is_file():
            yield from _tsv(path)
        elif suffix in (".jsonl", ".json") and path.is_file():
            yield from (_image_of(line, path, where) for where, line in _json_lines(path))
        elif suffix == ".txt" and path.is_file():
            for where, raw in _lines(path):
                line = _named(path, raw, where)
                yield _by_path(beside(path.parent, line), line, where)
        elif path.is_file() and suffix not in SUFFIXES:
            raise UsageError(
                f"{given} is no picture and no list of pictures (.txt, .jsonl, .tsv); convert it "
                "to JPEG or PNG, or rename it"
            )
        else:
            yield from (_by_path(found, str(found), str(found)) for found in find_images([given]))


def read_texts(inputs: Sequence[str]) -> Iterator[Item]:
    """Yield the texts of ``.txt`` files (a text a line, its id the line's number) and ``.jsonl``
    files (``{"text": ..., "text_id": ...}``, as the official ``*_texts.jsonl``).

    Raises:
        UsageError: a file is missing, of another kind, or a line cannot be understood.
        DataError: a line is too long, or the file cannot be read.
    """
    several = len(inputs) > 1
    for given in inputs:
        path = as_path(given)
        if not path.is_file():
            raise UsageError(f"no such file: {given}; texts come from .txt and .jsonl files")
        if path.suffix.lower() in (".jsonl", ".json"):
            for where, values in _json_lines(path):
                text = values.get("text")
                if not isinstance(text, str):
                    raise UsageError(f'{where}: expected {{"text_id": 1, "text": "..."}}')
                yield Item(_id(values, "text_id", where), text, _crc(text.encode()), where)
        elif path.suffix.lower() in (".txt", ""):
            for number, (where, raw) in enumerate(_lines(path), 1):
                name = f"{path_text(path)}:{number}" if several else number
                line = _decoded(raw, where)
                yield Item(name, line, _crc(line.encode()), where)
        else:
            raise UsageError(f"{given} is no list of texts (.txt, .jsonl); rename or convert it")


def _tsv(path: Path) -> Iterator[Item]:
    for where, raw in _lines(path, MAX_FILE):
        name, tab, encoded = raw.partition(b"\t")
        if not tab or not name:
            found = raw[:40].decode(errors="replace")
            raise UsageError(f"{where}: expected an id, a tab and base64, found {found!r}")
        try:
            content = decoded_base64(encoded, where)
        except DataError:
            content = b""  # no image: it is counted and listed when it is decoded
        yield Item(plain_id(_decoded(name, where)), content, _crc(content), where)


def _image_of(values: dict[str, Any], path: Path, where: str) -> Item:
    given = next((values[k] for k in ("image", "image_path", "path") if k in values), None)
    if not isinstance(given, str):
        raise UsageError(f'{where}: expected {{"image": "path", "image_id": 1}}')
    item = _by_path(beside(path.parent, given), given, where)
    if "image_id" not in values:
        return item
    return Item(_id(values, "image_id", where), item.content, item.stamp, where)


def _by_path(path: Path, name: str, where: str) -> Item:
    try:
        found = path.stat()
        stamp = f"{found.st_size}-{found.st_mtime_ns}"
    except (OSError, ValueError):
        stamp = "missing"  # reported when it is read
    return Item(path_text(name), path, stamp, path_text(where))


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, raw in _lines(path):
        line = _decoded(raw, where)
        try:
            values = read_json(line)
        except ValueError as error:
            raise UsageError(f"{where} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise UsageError(f"{where} is not a JSON object: {line[:40]!r}")
        yield where, values


def _lines(path: Path, limit: int = MAX_TEXT) -> Iterator[tuple[str, bytes]]:
    """Yield ("FILE, line N", line) of the lines that are not empty."""
    try:
        for number, raw in enumerate(stream_lines(path, 0, line_end(path), limit), 1):
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if line.strip():
                yield f"{path_text(path)}, line {number}", line.strip(b"\r\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise UsageError(f"{where} is not UTF-8; save the file as UTF-8") from None


def _named(path: Path, raw: bytes, where: str) -> str:
    """Return the path in a line of a list; its bytes may be those of a name that is not UTF-8."""
    name = os.fsdecode(raw)
    return name if os.path.lexists(beside(path.parent, name)) else _decoded(raw, where)


def _id(values: dict[str, Any], key: str, where: str) -> str | int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(f"{where}: {key} is {value!r}; give a number or a string")
    return value


def _crc(content: bytes) -> str:
    return f"{len(content)}-{zlib.crc32(content):08x}"

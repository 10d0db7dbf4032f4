"""Pictures and texts to embed, one at a time, out of folders, globs, text files, JSONL and TSV."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cn_clip.errors import UsageError
from cn_clip.image import SUFFIXES, find_images

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
    """Yield the pictures of folders, globs, picture files, ``.txt`` (a path a line), ``.jsonl``
    (``{"image": path, "image_id": id}``) and the official ``.tsv`` (id, tab, base64).

    Paths inside a file start at its folder. The id of a picture given by its path is that path.

    Raises:
        ImageError: a path does not exist, or a folder or glob holds no picture.
        UsageError: a line cannot be understood; it is named with its number.
    """
    for given in inputs:
        path = Path(given).expanduser()
        suffix = path.suffix.lower()
        if suffix == ".tsv" and path.is_file():
            yield from _tsv(path)
        elif suffix in (".jsonl", ".json") and path.is_file():
            yield from (_image_of(line, path, where) for where, line in _json_lines(path))
        elif suffix == ".txt" and path.is_file():
            for where, line in _lines(path):
                yield _by_path(path.parent / line, line, where)
        elif path.is_file() and suffix not in SUFFIXES:
            raise UsageError(
                f"{given} is no picture and no list of pictures (.txt, .jsonl, .tsv); rename it"
            )
        else:
            yield from (_by_path(found, str(found), str(found)) for found in find_images([given]))


def read_texts(inputs: Sequence[str]) -> Iterator[Item]:
    """Yield the texts of ``.txt`` files (a text a line, its id the line's number) and ``.jsonl``
    files (``{"text": ..., "text_id": ...}``, as the official ``*_texts.jsonl``).

    Raises:
        UsageError: a file is missing, of another kind, or a line cannot be understood.
    """
    several = len(inputs) > 1
    for given in inputs:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UsageError(f"no such file: {given}; texts come from .txt and .jsonl files")
        if path.suffix.lower() in (".jsonl", ".json"):
            for where, values in _json_lines(path):
                text = values.get("text")
                if not isinstance(text, str):
                    raise UsageError(f'{where}: expected {{"text_id": 1, "text": "..."}}')
                yield Item(_id(values, "text_id", where), text, _crc(text.encode()), where)
        elif path.suffix.lower() in (".txt", ""):
            for number, (where, line) in enumerate(_lines(path), 1):
                name = f"{path}:{number}" if several else number
                yield Item(name, line, _crc(line.encode()), where)
        else:
            raise UsageError(f"{given} is no list of texts (.txt, .jsonl); rename or convert it")


def _tsv(path: Path) -> Iterator[Item]:
    for where, line in _lines(path):
        name, tab, encoded = line.partition("\t")
        if not tab or not name:
            raise UsageError(f"{where}: expected an id, a tab and base64, found {line[:40]!r}")
        try:
            content = base64.b64decode(encoded, validate=False)
        except (binascii.Error, ValueError):
            content = b""  # no picture: it is counted and listed when it is decoded
        yield Item(_number(name), content, _crc(content), where)


def _image_of(values: dict[str, Any], path: Path, where: str) -> Item:
    given = next((values[k] for k in ("image", "image_path", "path") if k in values), None)
    if not isinstance(given, str):
        raise UsageError(f'{where}: expected {{"image": "path", "image_id": 1}}')
    item = _by_path(path.parent / given, given, where)
    if "image_id" not in values:
        return item
    return Item(_id(values, "image_id", where), item.content, item.stamp, where)


def _by_path(path: Path, name: str, where: str) -> Item:
    try:
        found = path.stat()
        stamp = f"{found.st_size}-{found.st_mtime_ns}"
    except OSError:
        stamp = "missing"  # reported when it is read
    return Item(name, path, stamp, where)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _lines(path):
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise UsageError(f"{where} is not a JSON object: {line[:40]!r}")
        yield where, values


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ("FILE, line N", line) of the lines that are not empty."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            except UnicodeDecodeError:
                raise UsageError(f"{where} is not UTF-8; save the file as UTF-8") from None
            if line.strip():
                yield where, line


def _id(values: dict[str, Any], key: str, where: str) -> str | int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(f"{where}: {key} is {value!r}; give a number or a string")
    return value


def _number(name: str) -> str | int:
    """Official ids are numbers; ``007`` is a string, so that it comes out as it went in."""
    return int(name) if name.isascii() and name.isdigit() and str(int(name)) == name else name


def _crc(content: bytes) -> str:
    return f"{len(content)}-{zlib.crc32(content):08x}"

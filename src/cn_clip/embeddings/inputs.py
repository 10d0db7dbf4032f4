"""Read images and texts to embed from folders, globs, lists and sources of pairs, one at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from cn_clip.data.sources.lines import json_object, line_end, stream_lines
from cn_clip.data.sources.list_or_table import refuse_table
from cn_clip.data.sources.lmdb import is_lmdb, lmdb_images
from cn_clip.data.sources.official import decode_base64, parse_id
from cn_clip.data.sources.open import paths_of
from cn_clip.data.sources.table import read_head
from cn_clip.embeddings.item import Item, file_item, stamp_of
from cn_clip.embeddings.pairs import holds_images, holds_texts, images_of, texts_of
from cn_clip.errors import DataError, ImageError, UsageError
from cn_clip.files import (
    MAX_TEXT,
    as_path,
    is_folder,
    of_suffixes,
    resolve_in,
    skipped_files,
    walk_folders,
)
from cn_clip.image.decode import SUFFIXES, find_images
from cn_clip.image.limits import MAX_BASE64
from cn_clip.text import path_text
from cn_clip.translation import _

Kind = Literal["images", "texts"]


def read_images(inputs: Sequence[str]) -> Iterator[Item]:
    """Yield the images of folders, globs, image files, ``.txt`` (one path per line), ``.jsonl``
    (``{"image": path, "image_id": id}``), the official ``.tsv`` (id, tab, base64), the official
    LMDB ``imgs``, and sources of pairs such as ``csv:products.csv``.

    Paths in a file are relative to its folder. The id of an image given by its path is that path.

    Raises:
        ImageError: a path does not exist, or a folder or glob holds no image.
        UsageError: a line is invalid, or a list is a table.
        DataError: a line is too long, or the file or source cannot be read.
    """
    for given in inputs:
        if holds_images(given):
            yield from images_of(given)
            continue
        path = as_path(given)
        suffix = path.suffix.lower()
        if suffix == ".tsv" and path.is_file():
            yield from _tsv(path)
        elif is_lmdb(path):
            for image_id, content, where in lmdb_images(path):
                yield Item(parse_id(path_text(image_id)), content, stamp_of(content), where)
        elif suffix in (".jsonl", ".json") and path.is_file():
            yield from (_json_item(line, path, where) for where, line in _json_lines(path))
        elif suffix == ".txt" and path.is_file():
            refuse_table(read_head(path), path_text(path))
            for where, raw in _lines(path):
                line = _listed_path(path, raw, where)
                yield file_item(resolve_in(path.parent, line), line, where)
        elif path.is_file() and suffix not in SUFFIXES:
            raise UsageError(
                _(
                    "{given} is neither an image nor a list of images (.txt, .jsonl, .tsv, .csv); "
                    "convert it to JPEG or PNG, or rename it",
                    given=given,
                )
            )
        else:
            yield from (file_item(file, str(file), str(file)) for file in find_images([given]))


def images_below(folder: Path) -> Iterator[Item]:
    """Yield the images of a folder and of all folders in it, folder by folder: only the names of
    one folder are in memory.

    Raises:
        ImageError: there is none.
    """
    empty, notes = True, list[str]()
    for _unused, entries in walk_folders(folder, notes):
        files = [Path(entry.path) for entry in entries if not is_folder(entry)]
        for file in of_suffixes(files, SUFFIXES):
            empty = False
            yield file_item(file, str(file), str(file))
        if skipped := skipped_files(files, SUFFIXES, folder):
            notes.append(skipped)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    if empty:
        raise ImageError(_("the folder {given!r} holds no image", given=path_text(folder)))


def read_texts(inputs: Sequence[str]) -> Iterator[Item]:
    """Yield the texts of ``.txt`` files (one text per line, the line number as its id),
    ``.jsonl`` files (``{"text": ..., "text_id": ...}``, as the official ``*_texts.jsonl``), and
    sources of pairs such as ``csv:products.csv``.

    Raises:
        UsageError: a file is missing or of another format, a line is invalid, or a list is a table.
        DataError: a line is too long, or the file or source cannot be read.
    """
    several = len(inputs) > 1
    for given in inputs:
        if holds_texts(given):
            yield from texts_of(given)
            continue
        path = as_path(given)
        if not path.is_file():
            raise UsageError(
                _("no such file: {given}; texts come from .txt, .jsonl and .csv files", given=given)
            )
        if path.suffix.lower() in (".jsonl", ".json"):
            for where, values in _json_lines(path):
                text = values.get("text")
                if not isinstance(text, str):
                    raise UsageError(
                        _('{where}: expected {{"text_id": 1, "text": "..."}}', where=where)
                    )
                yield Item(_id(values, "text_id", where), text, stamp_of(text.encode()), where)
        elif path.suffix.lower() in (".txt", ""):
            refuse_table(read_head(path), path_text(path))
            for number, (where, raw) in enumerate(_lines(path), 1):
                name = f"{path_text(path)}:{number}" if several else number
                line = _decoded(raw, where)
                yield Item(name, line, stamp_of(line.encode()), where)
        else:
            raise UsageError(
                _(
                    "{given} is not a list of texts (.txt, .jsonl, .csv); convert it",
                    given=given,
                )
            )


def is_quick_to_list(inputs: Sequence[str]) -> bool:
    """Return whether all inputs can be listed first, for a progress bar: not those whose images are
    inside of the file."""
    return not any(
        path.lower().partition("?")[0].endswith((".tsv", ".parquet", ".tar"))
        or path.startswith(("tsv:", "parquet:", "tar:", "lmdb:"))
        for path in inputs
    )


def paths_of_inputs(kind: Kind, inputs: Sequence[str]) -> list[str | Path]:
    """Return the files and folders of inputs, which no output may overwrite."""
    is_source = holds_images if kind == "images" else holds_texts
    paths: list[str | Path] = []
    for given in inputs:
        paths += paths_of(given) if is_source(given) else [given]
    return paths


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
        yield Item(parse_id(_decoded(name, where)), content, stamp_of(content), where)


def _json_item(values: dict[str, Any], path: Path, where: str) -> Item:
    given = next((values[k] for k in ("image", "image_path", "path") if k in values), None)
    if not isinstance(given, str):
        raise UsageError(_('{where}: expected {{"image": "path", "image_id": 1}}', where=where))
    item = file_item(resolve_in(path.parent, given), given, where)
    if "image_id" not in values:
        return item
    return Item(_id(values, "image_id", where), item.content, item.stamp, where)


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

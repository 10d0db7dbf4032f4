"""Any source of pairs by one string, such as ``tar:shards/{000..099}.tar``, and mixes of them."""

from __future__ import annotations

import bisect
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from cn_clip.data.captions import digest
from cn_clip.data.sources.base import Row, Source
from cn_clip.data.sources.folder import Folder
from cn_clip.data.sources.lmdb import Lmdb
from cn_clip.data.sources.official import Tsv
from cn_clip.data.sources.parquet import Parquet
from cn_clip.data.sources.table import Csv, JsonLines, Manifest, Table
from cn_clip.data.sources.tar import Tar
from cn_clip.errors import DataError, UnknownNameError, UsageError
from cn_clip.files import as_path, find
from cn_clip.text import path_text

_MOST_NAMES = 1_000_000  # that braces may stand for
_COLUMNS = ("image", "text", "image_id", "text_id")
_TABLE_OPTIONS = (*_COLUMNS, "root", "encoding")
# kind -> the options that may follow its path
KINDS = {
    "folder": ("encoding",),
    "csv": _TABLE_OPTIONS,
    "jsonl": _TABLE_OPTIONS,
    "parquet": (*_COLUMNS, "root"),
    "tsv": ("texts", "encoding", "unpaired"),
    "lmdb": (),
    "tar": (),
}


@dataclass(frozen=True, slots=True)
class Weighted:
    """A source of a mix; each of its pairs comes ``weight`` times an epoch on average."""

    source: Source
    weight: float = 1.0


def open_source(uri: str) -> Source:
    """Open ``KIND:PATH?OPTION=VALUE&...``; the kind may be left out where the path tells it.

    Args:
        uri: KIND is folder, csv, jsonl, parquet, tsv, lmdb or tar. PATH may hold globs and braces,
            ``{000..099}`` or ``{a,b}``; the files are then read one after another. Options: the
            columns ``image``, ``text``, ``image_id``, ``text_id`` of a manifest, its ``root`` for
            relative paths, the ``encoding`` of texts, the ``texts`` file of a tsv, and its
            ``unpaired=yes``, which takes pictures and texts without the other, to compare with.

    Raises:
        UsageError: the string cannot be understood.
        DataError: nothing is there, or it is damaged.
    """
    kind, path, options = _parsed(uri)
    paths = _expanded(path)
    if not paths:
        raise DataError(f"{uri}: nothing is at {path}")
    parts = [_open_one(kind, each, options) for each in paths]
    return parts[0] if len(parts) == 1 else Chain(uri, parts)


def split_of(folder: str, split: str) -> str:
    """Return the string of a split's source within a folder, as the usual layouts have it.

    The official ``SPLIT_imgs.tsv`` and ``lmdb/SPLIT``; ``SPLIT.jsonl``, ``.csv``, ``.parquet`` or
    ``.tar``; a folder ``SPLIT`` of tar shards, or of pictures with their texts.

    Raises:
        DataError: the folder has none of them.
    """
    root = as_path(folder)
    tables = {f"{split}.{kind}": kind for kind in ("jsonl", "csv", "parquet", "tar")}
    layouts = {f"{split}_imgs.tsv": "tsv", f"lmdb/{split}": "lmdb", **tables}
    for name, kind in layouts.items():
        if (root / name).exists():
            return f"{kind}:{root / name}"
    if any((root / split).glob("*.tar")):
        return f"tar:{root / split}/*.tar"
    if (root / split).is_dir():
        return f"folder:{root / split}"
    raise DataError(
        f"{folder} has no split {split!r}: neither {', '.join(layouts)} nor a folder {split}"
    )


def open_mix(uris: Sequence[str]) -> list[Weighted]:
    """Open several sources; ``0.5@tar:a.tar`` takes half of that one's pairs an epoch.

    Raises:
        UsageError, DataError: as ``open_source``, or a weight is not above zero.
    """
    if not uris:
        raise UsageError("no source of pairs; name one, such as folder:photos or tar:shards/*.tar")
    mix = []
    for uri in uris:
        weight, alone = _weight_of(uri)
        try:
            factor = float(weight)
        except ValueError:
            factor = 0.0
        if not 0 < factor < math.inf:
            raise UsageError(f"{uri}: the weight {weight} is not a number above zero")
        mix.append(Weighted(open_source(alone), factor))
    return mix


def paths_of(uri: str) -> list[Path]:
    """Return the files and folders that a source names, with or without a weight.

    Raises:
        UsageError: the string cannot be understood.
    """
    _, path, options = _parsed(_weight_of(uri)[1])
    texts = [as_path(options["texts"])] if "texts" in options else []
    return [*_expanded(path), *texts]


def _weight_of(uri: str) -> tuple[str, str]:
    """Return the weight before a source, ``"1"`` if there is none, and the source without it."""
    match = re.match(r"([\d.]+)@(.+)", uri, re.DOTALL)
    return (match[1], match[2]) if match else ("1", uri)


class Chain:
    """Sources one after another, as one."""

    def __init__(self, name: str, parts: Sequence[Source]) -> None:
        self.name = path_text(name)
        self._parts = parts
        self._starts = list(itertools.accumulate((len(part) for part in parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> Row:
        part, within = self._place(index)
        return part.row(within)

    def image(self, index: int) -> bytes:
        part, within = self._place(index)
        return part.image(within)

    def where(self, index: int) -> str:
        part, within = self._place(index)
        return part.where(within)

    def unmatched(self) -> list[str]:
        return [each for part in self._parts for each in part.unmatched()]

    def part(self, index: int) -> int:
        """Return which of the sources a pair is in."""
        return bisect.bisect_right(self._starts, index) - 1

    def _place(self, index: int) -> tuple[Source, int]:
        number = self.part(index)
        return self._parts[number], index - self._starts[number]


def id_digest(source: Source, index: int, id: str) -> int:
    """Return 64 bits that stand for an id of a pair, of its picture or its text.

    An id stands for one thing within a file only: img2dataset counts from 0 in every folder, and
    rows without an id go by their number.
    """
    part = source.part(index) if isinstance(source, Chain) else 0
    return digest(f"{part}\0{id}")


def _open_one(kind: str, path: Path, options: dict[str, str]) -> Source:
    name, encoding = path_text(f"{kind}:{path}"), options.get("encoding")
    if kind in ("csv", "jsonl", "parquet", "tar") and path.is_dir():
        raise DataError(f"{name} is a folder; name the files in it: {name}/*.{kind}")
    if kind in ("csv", "jsonl", "parquet"):
        if not path.exists():
            raise DataError(f"{name}: no such file: {path}")
        given = {column: options.get(column) for column in _COLUMNS}
        open_table: dict[str, Callable[[], Table]] = {
            "csv": lambda: Csv(name, path, given, encoding),
            "jsonl": lambda: JsonLines(name, path, given, encoding),
            "parquet": lambda: Parquet(name, path, given),
        }
        root = as_path(options["root"]) if "root" in options else path.parent
        return Manifest(name, open_table[kind](), root)
    if kind == "folder":
        return Folder(name, path, encoding)
    if kind == "tsv":
        texts = as_path(options["texts"]) if "texts" in options else None
        unpaired = options.get("unpaired", "no")
        if unpaired not in ("yes", "no"):
            raise UsageError(f"{name}: unpaired={unpaired} is not known; give yes or no")
        return Tsv(name, path, texts, encoding, unpaired=unpaired == "yes")
    return Lmdb(name, path) if kind == "lmdb" else Tar(path, name)


def _parsed(uri: str) -> tuple[str, str, dict[str, str]]:
    kind, colon, path = uri.partition(":")
    if not colon or (len(kind) == 1 and not kind.islower()):  # C:\photos is no kind
        kind, path = "", uri
    path, _, query = path.partition("?")
    if "=" not in query and query:  # a question mark of a glob
        path, query = f"{path}?{query}", ""
    if not path.strip():
        raise UsageError(f"{uri!r} names no path; write KIND:PATH, such as folder:photos")
    kind = kind or _told(path, uri)
    if kind not in KINDS:
        raise UnknownNameError("kind of source", kind, KINDS)
    options = dict(parse_qsl(query, keep_blank_values=True))
    for option in options:
        if option not in KINDS[kind]:
            raise UnknownNameError(f"option of {kind}:", option, KINDS[kind] or ["none"])
        if not options[option].strip():
            raise UsageError(f"{uri}: {option} is empty; give a value, or leave it out")
    return kind, path, options


def _told(path: str, uri: str) -> str:
    """Tell the kind from the path."""
    suffix = Path(path).suffix.lower()
    if path.endswith("_imgs.tsv"):
        return "tsv"
    known = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".parquet": "parquet", ".tar": "tar"}
    if suffix in known:
        return known[suffix]
    if re.search(r"\.(tgz|tbz2?|txz|tar\.\w+)$", path.lower()):
        return "tar"  # which says what to do with it
    place = os.path.expanduser(path)
    if os.path.isdir(os.path.join(place, "pairs")) and os.path.isdir(os.path.join(place, "imgs")):
        return "lmdb"
    if os.path.isdir(place):
        return "folder"
    raise UsageError(
        f"{uri}: which kind of source is it? Write KIND:PATH; KIND: {', '.join(KINDS)}"
    )


def _expanded(pattern: str) -> list[Path]:
    """Expand braces, then globs; what braces name must exist, what globs find is sorted."""
    literal = os.path.lexists(os.path.expanduser(pattern))
    found: list[Path] = []
    for path in map(as_path, [pattern] if literal else _braces(pattern)):
        magic = any(c in str(path) for c in "*?[")
        found += [path] if path.exists() or not magic else find(str(path))
    return found


def _braces(pattern: str) -> list[str]:
    """Expand every ``{000..099}`` and ``{a,b}``, inner ones first.

    Raises:
        UsageError: they name more files than anybody has.
    """
    done, names = False, [pattern]
    while not done:
        # Pieces of plain text and of choices by turns; choices are a range or a list.
        split = [re.split(r"(\{\d+\.\.\d+\}|\{[^{}]*,[^{}]*\})", name) for name in names]
        count = sum(math.prod(len(_span(piece)) for piece in each[1::2]) for each in split)
        if count > _MOST_NAMES:
            raise UsageError(
                f"{pattern} names {count:,} files, above the limit of {_MOST_NAMES:,}; name fewer, "
                "or use a glob such as *.tar"
            )
        names = ["".join(each) for pieces in split for each in itertools.product(*_every(pieces))]
        done = all(len(pieces) == 1 for pieces in split)
    return names


def _every(pieces: Sequence[str]) -> Iterator[list[str]]:
    for at, piece in enumerate(pieces):
        yield _choices(piece) if at % 2 else [piece]


def _span(braces: str) -> range:
    """Return as many numbers as there are choices in braces."""
    ends = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", braces)
    if ends is None:
        return range(braces.count(",") + 1)
    if max(map(len, ends.groups())) > 18:
        return range(_MOST_NAMES + 1)
    return range(int(ends[1]), int(ends[2]) + 1)


def _choices(braces: str) -> list[str]:
    ends = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", braces)
    if ends is None:
        return braces[1:-1].split(",")
    first, last = ends.groups()
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [f"{number:0{width}}" for number in _span(braces)]

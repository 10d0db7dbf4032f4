"""Open a source by its URI, such as ``tar:shards/{000..099}.tar``, and mixes of sources."""

from __future__ import annotations

import bisect
import itertools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote

import numpy as np
import numpy.typing as npt

from cn_clip.data.process_map import Progress, no_progress
from cn_clip.data.sources.base import Row, Source
from cn_clip.data.sources.folder import Folder
from cn_clip.data.sources.lmdb import Lmdb
from cn_clip.data.sources.official import Tsv
from cn_clip.data.sources.parquet import Parquet
from cn_clip.data.sources.remote import SCHEMES, find_files, is_remote
from cn_clip.data.sources.row_keys import image_key
from cn_clip.data.sources.shard_file import LocalFile, ShardFile
from cn_clip.data.sources.table import PAIR, Csv, JsonLines, Manifest, Table
from cn_clip.data.sources.tar import Tar
from cn_clip.data.sources.tar_shards import check_no_folder, open_tars
from cn_clip.errors import DataError, UnknownNameError, UsageError
from cn_clip.files import as_path, find
from cn_clip.outputs import is_within
from cn_clip.text import path_text
from cn_clip.translation import N_, _, _n, translate

_MAX_FILES = 1_000_000  # that braces may expand to
_MAX_DEPTH = 16  # of nested braces
_COLUMNS = ("image", "text", "image_id", "text_id")
_TABLE_OPTIONS = (*_COLUMNS, "root", "encoding")
# kind -> options
SOURCE_OPTIONS = {
    "folder": ("encoding",),
    "csv": _TABLE_OPTIONS,
    "jsonl": _TABLE_OPTIONS,
    "parquet": (*_COLUMNS, "root"),
    "tsv": ("texts", "encoding", "unpaired"),
    "lmdb": (),
    "tar": ("order", "damaged", "unpaired"),
}
REMOTE_KINDS = ("tar", "parquet")
ORDERS = ("random", "stream")
DAMAGED = ("stop", "skip")  # what damaged shards do
# Suffixes of files that are no source -> what to do.
_JSON_REMEDY = N_(
    "a JSON file; write one object per line (jq -c '.[]' FILE > NEW.jsonl), or give jsonl:{path} "
    "if it has them"
)
_SHEET_REMEDY = N_(
    "a spreadsheet; save it as CSV (UTF-8), with a column of images and one of captions"
)
_REMEDIES = {".json": _JSON_REMEDY} | dict.fromkeys((".xlsx", ".xls", ".ods"), _SHEET_REMEDY)


@dataclass(frozen=True, slots=True)
class WeightedSource:
    """A source of a mix; an epoch has ``weight`` times its pairs."""

    source: Source
    weight: float = 1.0


def open_source(
    uri: str,
    *,
    workers: int = 0,
    required: Sequence[str] = PAIR,
    on_progress: Progress = no_progress,
) -> Source:
    """Open ``KIND:PATH?OPTION=VALUE&...``; KIND is optional if the path implies it.

    Args:
        uri: KIND is folder, csv, jsonl, parquet, tsv, lmdb or tar. PATH may contain globs and
            braces, ``{000..099}`` or ``{a,b}``; the files are concatenated. Options: the columns
            ``image``, ``text``, ``image_id``, ``text_id`` of a manifest, its ``root`` for relative
            paths, the ``encoding`` of texts, the ``texts`` file of a tsv, and its
            ``unpaired=yes``, which includes images without texts and texts without images; the
            ``order`` that training reads a tar in, ``random`` or ``stream``; its
            ``unpaired=yes``, which includes images without texts; ``damaged=skip``, which leaves
            damaged shards of several tars out. PATH of a tar or Parquet file may be a URL; a remote
            tar is read in the order ``stream`` unless ``order`` is given.
        workers: processes that index tar shards which have no index yet; 0 indexes in this process.
        required: the columns that a table must have: "image", "text". What a table lacks is empty
            in its rows. If "text" is not among them, a tar is opened with ``unpaired=yes``.
        on_progress: called with (done, total) shards while they are indexed.

    Raises:
        UsageError: the URI is invalid.
        DataError: the source does not exist or is damaged.
    """
    kind, path, options = parse_uri(uri)
    files = source_files(uri)
    if kind == "tar":
        order = options.get("order", ORDERS[is_remote(path)])
        if order not in ORDERS:
            raise UnknownNameError(_("order of {uri}:", uri=uri), order, ORDERS)
        skip = options.get("damaged", DAMAGED[0])
        if skip not in DAMAGED:
            raise UnknownNameError(_("damaged of {uri}:", uri=uri), skip, DAMAGED)
        parts, left_out = open_tars(
            files,
            unpaired=_unpaired(uri, options) or "text" not in required,
            skip_damaged=skip == "skip",
            workers=workers,
            on_progress=on_progress,
        )
        if left_out:
            warnings.warn(
                _n(
                    "{uri}: {count:,} of {total:,} shards is left out; the first: {first}",
                    "{uri}: {count:,} of {total:,} shards are left out; the first: {first}",
                    len(left_out),
                    uri=uri,
                    total=len(files),
                    first=left_out[0],
                ),
                stacklevel=2,
            )
        if order == "stream" or left_out:
            return Chain(uri, parts, streamed=order == "stream", left_out=left_out)
    else:
        parts = [open_file(kind, file, options, required) for file in files]
    return parts[0] if len(parts) == 1 else Chain(uri, parts)


def source_files(uri: str) -> Sequence[ShardFile]:
    """Return the files or folders of a source, on this machine or behind URLs.

    Raises:
        UsageError: the URI is invalid, or this kind is not read from remote places.
        DataError: there are none.
    """
    kind, path, _unused = parse_uri(uri)
    files: Sequence[ShardFile]
    if not is_remote(path):
        files = [LocalFile(file) for file in expand(path)]
    elif kind in REMOTE_KINDS:
        files = find_files(path, _expand_braces(path))
    else:
        raise UsageError(
            _(
                "{uri}: only tar shards and Parquet files are read from remote places; download "
                "it first",
                uri=uri,
            )
        )
    if not files:
        raise DataError(_("{uri}: no file matches {path}", uri=uri, path=path))
    return files


def split_source(folder: str, split: str) -> str:
    """Return the URI of a split in a folder of a common layout.

    Layouts: the official ``SPLIT_imgs.tsv`` and ``lmdb/SPLIT``; ``SPLIT.jsonl``, ``.csv``,
    ``.parquet`` or ``.tar``; a folder ``SPLIT`` of tar shards, or of images with their texts.

    Raises:
        DataError: the folder has none of these.
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
        _(
            "{folder} has no split {split!r}: neither {layouts} nor a folder {split}",
            folder=folder,
            split=split,
            layouts=", ".join(layouts),
        )
    )


def open_mix(
    uris: Sequence[str], *, workers: int = 0, on_progress: Progress = no_progress
) -> list[WeightedSource]:
    """Open several sources; ``0.5@tar:a.tar`` uses half of the source's pairs per epoch.

    ``workers`` and ``on_progress`` are those of ``open_source``.

    Raises:
        UsageError, DataError: as ``open_source``, or a weight is not positive.
    """
    if not uris:
        raise UsageError(
            _("no source of pairs; give one, such as folder:photos or tar:shards/*.tar")
        )
    mix = []
    for uri in uris:
        weight, alone = _weight_of(uri)
        try:
            factor = float(weight)
        except ValueError:
            factor = 0.0
        if not 0 < factor < math.inf:
            raise UsageError(
                _("{uri}: the weight {weight} is not a number above zero", uri=uri, weight=weight)
            )
        source = open_source(alone, workers=workers, on_progress=on_progress)
        mix.append(WeightedSource(source, factor))
    return mix


def names_source(given: str, *suffixes: str) -> bool:
    """Return whether a user means a source: ``KIND:PATH``, or a path with one of the suffixes."""
    kind, colon, _path = given.partition(":")
    if colon and kind in SOURCE_OPTIONS:
        return True
    path = given.partition("?")[0]
    return path.lower().endswith(suffixes) and not os.path.isdir(os.path.expanduser(path))


def paths_of(uri: str) -> list[Path]:
    """Return the files and folders of a source URI, with or without a weight.

    A ``root`` that holds the current folder is not among them: it would hold all outputs.

    Raises:
        UsageError: the URI is invalid.
    """
    _, path, options = parse_uri(_weight_of(uri)[1])
    here = Path(os.path.realpath("."))
    given = (options[option] for option in ("texts", "root") if option in options)
    named = [as_path(path) for path in given if not is_remote(path)]
    return [
        *([] if is_remote(path) else expand(path)),
        *(path for path in named if not is_within(here, Path(os.path.realpath(path)))),
    ]


def absolute_uri(uri: str) -> str:
    """Return a source URI that names the same source from any folder.

    Raises:
        UsageError: the URI is invalid.
    """
    kind, path, options = parse_uri(uri)
    for option in ("texts", "root"):
        if option in options and not is_remote(options[option]):
            options[option] = os.path.abspath(as_path(options[option]))
    query = "&".join(f"{name}={quote(value)}" for name, value in options.items())
    local = os.path.join(os.getcwd(), os.path.expanduser(path))
    absolute = path if is_remote(path) else local
    return f"{kind}:{absolute}" + (f"?{query}" if query else "")


def _weight_of(uri: str) -> tuple[str, str]:
    """Return the weight before a source, ``"1"`` if there is none, and the source without it."""
    match = re.match(r"([\d.]+)@(.+)", uri, re.DOTALL)
    return (match[1], match[2]) if match else ("1", uri)


class Chain:
    """Concatenated sources; with ``streamed``, they are shards that training reads one by one.

    ``left_out`` has a message for each file that is not among them.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Source],
        *,
        streamed: bool = False,
        left_out: Sequence[str] = (),
    ) -> None:
        self.name = path_text(name)
        self.parts, self.streamed, self._left_out = parts, streamed, list(left_out)
        self._starts = list(itertools.accumulate((len(part) for part in parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> Row:
        part, offset = self.locate(index)
        return part.row(offset)

    def image(self, index: int) -> bytes:
        part, offset = self.locate(index)
        return part.image(offset)

    def where(self, index: int) -> str:
        part, offset = self.locate(index)
        return part.where(offset)

    def unmatched(self) -> list[str]:
        unmatched = [message for part in self.parts for message in part.unmatched()]
        return [*self._left_out, *unmatched]

    def read_ahead(self, first: int, stop: int) -> None:
        """Start reading the pairs ``first`` to ``stop``, which are of one shard."""
        number = self.part(first)
        part, start = self.parts[number], self._starts[number]
        if isinstance(part, Tar):
            part.read_ahead(first - start, stop - start)

    def part(self, index: int) -> int:
        """Return the number of the source that a pair is in."""
        return bisect.bisect_right(self._starts, index) - 1

    def locate(self, index: int) -> tuple[Source, int]:
        """Return the source that a pair is in, and its index there."""
        number = self.part(index)
        return self.parts[number], index - self._starts[number]


def image_file(source: Source, index: int) -> Path | None:
    """Return the path of a pair's image if it is a file of its own, and not part of another.

    Raises:
        DataError: the row is invalid.
    """
    if isinstance(source, Chain):
        return image_file(*source.locate(index))
    return source.file(index) if isinstance(source, Folder | Manifest) else None


def parts_of(source: Source) -> Sequence[Source]:
    """Return the concatenated sources, or the source alone."""
    return source.parts if isinstance(source, Chain) else [source]


def read_ahead(source: Source, indexes: npt.NDArray[np.int64]) -> None:
    """Start reading the pairs of a streamed source that are about to be read."""
    if not isinstance(source, Chain) or not source.streamed:
        return
    numbers = np.array([source.part(index) for index in indexes.tolist()])
    for number in np.unique(numbers).tolist():
        own = indexes[numbers == number]
        source.read_ahead(int(own.min()), int(own.max()) + 1)


def is_forkable(source: Source) -> bool:
    """Return whether a forked process can read a source; of remote files it cannot."""
    return not any(isinstance(p, Tar | Manifest) and p.is_remote for p in parts_of(source))


def id_digest(source: Source, index: int, id: str) -> int:
    """Return a 64-bit digest of the image id or text id of a pair.

    Ids are unique within one file only: img2dataset counts from 0 in every folder, and rows without
    an id use their number.
    """
    return image_key(source.part(index) if isinstance(source, Chain) else 0, id)


def open_file(
    kind: str, file: ShardFile, options: Mapping[str, str], required: Sequence[str] = PAIR
) -> Source:
    """Open one file of a source, or one folder; tar shards are opened by ``open_tars``.

    Raises:
        UsageError, DataError: as ``open_source``.
    """
    name, encoding = f"{kind}:{file.name}", options.get("encoding")
    root: Path | str | None = None
    if "root" in options:
        given = options["root"]
        root = given.rstrip("/") if is_remote(given) else as_path(given)
    columns = {column: options.get(column) for column in _COLUMNS}
    if not isinstance(file, LocalFile):
        folder = file.name.rpartition("/")[0] if root is None else root
        return Manifest(name, Parquet(name, file, columns, required), folder, file)
    path = file.path
    if kind in ("csv", "jsonl", "parquet"):
        check_no_folder(path, kind)
    if kind in ("csv", "jsonl", "parquet"):
        if not path.exists():
            raise DataError(_("{name}: no such file: {path}", name=name, path=path))
        open_table: dict[str, Callable[[], Table]] = {
            "csv": lambda: Csv(name, path, columns, encoding, required),
            "jsonl": lambda: JsonLines(name, path, columns, encoding, required),
            "parquet": lambda: Parquet(name, file, columns, required),
        }
        folder = path.parent if root is None else root
        return Manifest(name, open_table[kind](), folder, file, encoding)
    if kind == "folder":
        return Folder(name, path, encoding)
    if kind == "tsv":
        texts = as_path(options["texts"]) if "texts" in options else None
        return Tsv(name, path, texts, encoding, unpaired=_unpaired(name, options))
    return Lmdb(name, path)


def _unpaired(name: str, options: Mapping[str, str]) -> bool:
    unpaired = options.get("unpaired", "no")
    if unpaired not in ("yes", "no"):
        raise UsageError(
            _(
                "{name}: unpaired={unpaired} is unknown; give yes or no",
                name=name,
                unpaired=unpaired,
            )
        )
    return unpaired == "yes"


def parse_uri(uri: str) -> tuple[str, str, dict[str, str]]:
    """Return the kind, the path and the options of a source URI.

    Raises:
        UsageError: it is invalid.
    """
    kind, colon, path = uri.partition(":")
    windows = len(kind) == 1 and not kind.islower()  # C:\photos
    if not colon or windows or (kind in SCHEMES and is_remote(uri)):
        kind, path = "", uri
    path, _unused, query = path.partition("?")
    if "=" not in query and query:  # "?" of a glob
        path, query = f"{path}?{query}", ""
    if not path.strip():
        raise UsageError(_("{uri!r} has no path; write KIND:PATH, such as folder:photos", uri=uri))
    kind = kind or _detect_kind(path, uri)
    if kind not in SOURCE_OPTIONS:
        raise UnknownNameError(_("kind of source"), kind, SOURCE_OPTIONS)
    options = dict(parse_qsl(query, keep_blank_values=True))
    for option in options:
        if option not in SOURCE_OPTIONS[kind]:
            raise UnknownNameError(
                _("option of {kind}:", kind=kind), option, SOURCE_OPTIONS[kind] or [_("none")]
            )
        if not options[option].strip():
            raise UsageError(
                _("{uri}: {option} is empty; give a value, or leave it out", uri=uri, option=option)
            )
    return kind, path, options


def _detect_kind(path: str, uri: str) -> str:
    """Return the kind of source at a path."""
    suffix = Path(path).suffix.lower()
    if path.endswith("_imgs.tsv"):
        return "tsv"
    known = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".parquet": "parquet", ".tar": "tar"}
    if suffix in known:
        return known[suffix]
    if re.search(r"\.(tgz|tbz2?|txz|tar\.\w+)$", path.lower()):
        return "tar"  # its reader asks to decompress the file
    folder = os.path.expanduser(path)
    if os.path.isdir(os.path.join(folder, "pairs")) and os.path.isdir(os.path.join(folder, "imgs")):
        return "lmdb"
    if os.path.isdir(folder):
        return "folder"
    if suffix in _REMEDIES:
        raise UsageError(
            _("{uri} is {format}", uri=uri, format=translate(_REMEDIES[suffix], path=path))
        )
    if not any(c in path for c in "*?[{") and not os.path.lexists(folder):
        raise UsageError(
            _(
                "no such file or folder: {path}; a source is KIND:PATH, such as folder:photos",
                path=path_text(path),
            )
        )
    raise UsageError(
        _(
            "{uri}: unknown kind of source; write KIND:PATH, KIND one of {kinds}",
            uri=uri,
            kinds=", ".join(SOURCE_OPTIONS),
        )
    )


def expand(pattern: str) -> list[Path]:
    """Expand braces, then globs. Brace names must exist; glob matches are sorted."""
    literal = os.path.lexists(os.path.expanduser(pattern))
    paths: list[Path] = []
    for path in map(as_path, [pattern] if literal else _expand_braces(pattern)):
        is_glob = any(c in str(path) for c in "*?[")
        paths += [path] if path.exists() or not is_glob else find(str(path))
    return paths


def _expand_braces(pattern: str) -> list[str]:
    """Expand all ``{000..099}`` and ``{a,b}``, nested ones too, in the order of a shell.

    Braces without a partner make the whole pattern literal, braces without a comma themselves.

    Raises:
        UsageError: there are too many names, or too many nested braces.
    """
    outer: list[tuple[list[str], list[str]]] = []  # by open brace: names before it, and inside
    names = [""]
    for token in re.split(r"(\{\d+\.\.\d+\}|[{},])", pattern):
        if token == "{":
            outer.append((names, []))
            names = [""]
            if len(outer) > _MAX_DEPTH:
                raise UsageError(
                    _(
                        "{pattern} has more than {limit} nested braces; give fewer",
                        pattern=pattern,
                        limit=_MAX_DEPTH,
                    )
                )
        elif token == "," and outer:
            outer[-1][1].extend(names)
            names = [""]
        else:
            count, choices = _choices(token)
            if token == "}" and outer:
                before, inside = outer.pop()
                choices = [*inside, *names] if inside else [f"{{{name}}}" for name in names]
                names, count = before, len(choices)
            total = len(names) * count + (len(outer[-1][1]) if outer else 0)
            total *= math.prod(len(before) for before, _inside in outer)
            if total > _MAX_FILES:
                raise UsageError(
                    _(
                        "{pattern} names {total:,} files, above the limit of {limit:,}; give "
                        "fewer, or use a glob such as *.tar",
                        pattern=pattern,
                        total=total,
                        limit=_MAX_FILES,
                    )
                )
            names = list(map("".join, itertools.product(names, choices)))
    return [pattern] if outer else names


def _choices(token: str) -> tuple[int, Iterable[str]]:
    """Return the count of ``{FIRST..LAST}``, 1 for any other text, and the choices."""
    ends = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", token)
    if ends is None:
        return 1, [token]
    if max(map(len, ends.groups())) > 18:
        return _MAX_FILES + 1, []
    first, last = map(int, ends.groups())
    numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
    width = len(ends[1]) if ends[1][0] == "0" or len(ends[1]) == len(ends[2]) else 0
    return len(numbers), (f"{number:0{width}}" for number in numbers)

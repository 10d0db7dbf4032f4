"""Tar shards of WebDataset and img2dataset, in random access, without extraction."""

from __future__ import annotations

import gc
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cn_clip.data.sources.array_file import (
    ArrayFile,
    mapped,
    smallest,
    string_arrays,
    strings,
    write_arrays,
)
from cn_clip.data.sources.base import Row
from cn_clip.data.sources.index_cache import cached_index
from cn_clip.data.sources.lines import json_object
from cn_clip.data.sources.row_keys import captions_of, image_keys, lengths_of
from cn_clip.data.sources.shard_file import (
    FileState,
    LocalFile,
    ShardFile,
    changed_message,
)
from cn_clip.data.sources.tar_scan import (
    BLOCK,
    JSON_SUFFIXES,
    TEXT_SUFFIXES,
    buffered,
    member_name,
    members,
)
from cn_clip.errors import DataError, UnavailableError
from cn_clip.files import is_apple_double, skipped_files
from cn_clip.image.decode import SUFFIXES
from cn_clip.text import decode_utf8, path_text, read_json
from cn_clip.translation import _

_SUFFIXES = frozenset((*SUFFIXES, *TEXT_SUFFIXES, *JSON_SUFFIXES))
_TEXT_OR_JSON = (*TEXT_SUFFIXES, *JSON_SUFFIXES)
_PARTS = (SUFFIXES, TEXT_SUFFIXES, JSON_SUFFIXES)
_INDEX_SUFFIX = ".3.index"  # format version of the index
_UNPAIRED_SUFFIX = ".unpaired" + _INDEX_SUFFIX
_ONE_READ = 1 << 14  # bytes


class Tar:
    """One shard: members ``KEY.jpg``, ``KEY.txt``, ``KEY.json`` make a sample, in any order.

    KEY is a member's path without its last suffix. Members that do not match this way are matched
    by their names up to the first dot, as in WebDataset: ``KEY.img.jpg`` and ``KEY.cap.txt``.

    The text is ``KEY.txt``, or else ``caption`` or ``text`` in the JSON. A list ``texts`` in the
    JSON, as ``data.shard`` writes it, makes one pair per text. The ids are those in the JSON, or
    else the key.

    With ``unpaired``, images without a text are rows too, with ``text=""`` and ``text_id=""``.
    """

    def __init__(
        self,
        file: Path | ShardFile,
        name: str | None = None,
        *,
        state: FileState | None = None,
        pairs: int | None = None,
        unpaired: bool = False,
    ) -> None:
        """Open a shard; its index is built once.

        Args:
            file: the shard.
            name: its URI.
            state: its present state, if it is known.
            pairs: how many rows it has, if that is known: its index is opened when it is needed.
            unpaired: whether images without a text are rows.

        Raises:
            DataError: the tar is incomplete (perhaps still being written) or has no row.
            CNClipError: the index cannot be written.
        """
        self.file = LocalFile(file) if isinstance(file, Path) else file
        self.name = path_text(name or f"tar:{self.file.name}")
        self.unpaired = unpaired
        self._index_path: Path | None = None
        self.state = self.file.state() if state is None else state
        self._pairs: int = self._index().values["pairs"] if pairs is None else pairs
        if not self._pairs and unpaired:
            raise DataError(_("{path} holds no image", path=self.file.name))
        if not self._pairs:
            raise DataError(
                _(
                    "{path} holds no image with a text or JSON of the same name",
                    path=self.file.name,
                )
            )

    def __len__(self) -> int:
        return self._pairs

    @property
    def is_remote(self) -> bool:
        """Whether the shard is behind a URL."""
        return not isinstance(self.file, LocalFile)

    def row(self, index: int) -> Row:
        arrays = self._index()
        sample, text_number = _sample_of(arrays, index)
        text, values = (_span(arrays, sample, part) for part in ("text", "json"))
        # Text and JSON are neighbours in most shards: one read is enough.
        start, stop = min(text[0], values[0]), max(sum(text), sum(values))
        if text[1] and values[1] and stop - start < _ONE_READ:
            both = self._read(start, stop - start)
            content = both[values[0] - start :][: values[1]]
            caption: bytes | None = both[text[0] - start :][: text[1]]
        else:
            content = self._read(*values) if values[1] else b""
            caption = self._read(*text) if text[1] else None
        found = _json(content) if content else {}
        if not isinstance(found, dict):  # again, as only the message needs the location
            found = json_object(content, _("the JSON of {where}", where=self.where(index)))
        return _row(
            found,
            caption,
            text_number,
            lambda: self._key(arrays, sample),
            lambda: self.where(index),
            unpaired=self.unpaired,
        )

    def image(self, index: int) -> bytes:
        arrays = self._index()
        return self._read(*_span(arrays, _sample_of(arrays, index)[0], "image"))

    def where(self, index: int) -> str:
        arrays = self._index()
        try:
            key = self._key(arrays, _sample_of(arrays, index)[0])
        except DataError:  # the shard is gone
            key = _("of pair {index}", index=index)
        return _("{path}, member {key}", path=self.file.name, key=key)

    def unmatched(self) -> list[str]:
        messages: list[str] = self._index().values["unmatched"]
        return messages

    def read_ahead(self, first: int, stop: int) -> None:
        """Ask the system to read the pairs ``first`` to ``stop``, without waiting for it."""
        with suppress(DataError):  # reported when a pair is read
            arrays = self._index()
            samples = [_sample_of(arrays, index)[0] for index in (first, stop - 1)]
            begin = int(arrays["image_at"][samples[0]]) * BLOCK
            size = max(sum(_span(arrays, samples[1], part)) for part in ("image", "text", "json"))
            self.file.read_ahead(min(begin, size), abs(size - begin))

    def image_keys(self, part: int, first: int) -> npt.NDArray[np.uint64]:
        arrays = self._index()
        return image_keys(arrays, len(arrays["image_at"]), part, first)

    def stored_images(self) -> tuple[int, int]:
        """Return the number of images, and their bytes."""
        sizes = self._index()["image_size"]
        return len(sizes), int(sizes.sum(dtype=np.int64))

    def captions(self) -> npt.NDArray[np.uint64]:
        return self._index()["caption_key"]

    def lengths(self) -> npt.NDArray[Any]:
        return self._index()["length"]

    def _index(self) -> ArrayFile:
        if self._index_path is not None:
            with suppress(DataError):  # deleted: it is built again
                return mapped(self._index_path)
        file, state, unpaired = self.file, self.state, self.unpaired
        self._index_path = cached_index(
            file,
            state,
            _UNPAIRED_SUFFIX if unpaired else _INDEX_SUFFIX,
            lambda to: _write_index(file, state, to, unpaired=unpaired),
            _check_index,
        )
        return mapped(self._index_path)

    def _key(self, arrays: ArrayFile, sample: int) -> str:
        """Return the key of a sample: it is stored if it is not the one in the image's header."""
        named = arrays["named"]
        at = int(np.searchsorted(named, sample))
        if at < len(named) and named[at] == sample:
            return next(islice(strings(arrays, "name", len(named)), at, None))
        header = self._read((int(arrays["image_at"][sample]) - 1) * BLOCK, BLOCK)
        return member_name(header).rpartition(".")[0]

    def _read(self, offset: int, length: int) -> bytes:
        return self.file.read(self.state, offset, length)


def _row(
    values: dict[str, Any],
    text: bytes | None,
    text_number: int,
    key: Callable[[], str],
    where: Callable[[], str],
    *,
    unpaired: bool,
) -> Row:
    """Return a row of a sample.

    Args:
        values: of the JSON; empty without one.
        text: content of the text member, if there is one.
        text_number: in the list of texts, -1 without a list.
        key: returns the sample's key.
        where: returns its location, for messages.
        unpaired: whether it may have no caption.
    """
    named = next((name for name in ("image_id", "key") if name in values), None)
    image_id = key() if named is None else str(values[named])
    if text_number >= 0:
        texts = _texts(values)
        if text_number >= len(texts):
            raise DataError(
                _("{where} has changed since it was opened; start again", where=where())
            )
        return Row(texts[text_number]["text"], image_id, texts[text_number]["text_id"])
    caption = values.get("caption", values.get("text"))
    if text is not None:
        try:
            caption = decode_utf8(text)
        except UnicodeDecodeError:
            raise DataError(
                _("{where}: its text is not UTF-8; pack it again", where=where())
            ) from None
    if caption is None and unpaired:
        return Row("", image_id, "")
    if not isinstance(caption, str):
        raise DataError(
            _(
                "{where}: its caption is {text!r:.40}; expected a string",
                where=where(),
                text=caption,
            )
        )
    return Row(caption.strip("\r\n"), image_id, str(values.get("text_id", image_id)))


def _sample_of(arrays: ArrayFile, index: int) -> tuple[int, int]:
    """Return the sample of a pair, and the number of its text in the sample's list, or -1."""
    samples = arrays.get("sample")
    if samples is None:
        if not 0 <= index < arrays.values["pairs"]:
            raise IndexError(index)
        return index, -1
    return int(samples[index]), int(arrays["text_number"][index])


def _span(arrays: ArrayFile, sample: int, part: str) -> _Span:
    """Return offset and size of a sample's image, text or JSON; (0, 0) if there is none."""
    start, size = int(arrays["image_at"][sample]), int(arrays[f"{part}_size"][sample])
    if part != "image":
        start += int(arrays[f"{part}_gap"][sample])
    return (start * BLOCK, size) if size else (0, 0)


@dataclass(slots=True)
class Sample:
    """An image with all its texts: encoded bytes, file suffix, ids and texts."""

    image: bytes
    suffix: str
    image_id: str
    texts: list[tuple[str, str]]
    """(text_id, text)"""


_Span = tuple[int, int]  # offset and size


@dataclass(slots=True)
class _Members:
    """The members of one name: image, text and JSON, by suffix, in archive order."""

    key: str
    parts: dict[str, _Span] = field(default_factory=dict)
    is_simple: bool = False
    """Whether the key is the name in the headers without its suffix."""

    def part(self, suffixes: Sequence[str]) -> _Span | None:
        for suffix in suffixes:
            if (span := self.parts.get(suffix)) is not None:
                return span
        return None

    @property
    def image(self) -> _Span | None:
        return self.part(SUFFIXES)

    @property
    def has_text(self) -> bool:
        """Whether there is a text or JSON member."""
        return self.part(_TEXT_OR_JSON) is not None


def _check_index(index: Path) -> Path:
    """Return the path of an index.

    Raises:
        DataError: it is damaged.
    """
    mapped(index)
    return index


def _write_index(file: ShardFile, state: FileState, to: Path, *, unpaired: bool) -> None:
    """Index a shard in the given state; with ``unpaired``, images without a text are samples.

    Arrays of S samples: ``image_at`` in blocks of 512 bytes; ``text_gap`` and ``json_gap``, blocks
    from there; ``image_size``, ``text_size``, ``json_size`` in bytes; ``id``, the image ids. Of N
    pairs: ``caption_key``, ``length``, and if any sample has a list of texts, ``sample`` and
    ``text_number``. Of keys that are not the names of images: ``named``, their samples, and
    ``name``.

    Raises:
        DataError: the shard cannot be read, or is in another state.
    """
    unmatched: list[str] = []
    with _no_garbage_collection():
        samples, alone = _match_samples(_collect_members(file, state, unmatched))
        if unpaired:
            samples += [member for member in alone if member.image is not None]
            samples.sort(key=lambda sample: sample.image or (0, 0))
            alone = [member for member in alone if member.image is None]
        pairs, rows = _read_samples(file, state, samples, unpaired=unpaired)
    if file.state() != state:
        raise UnavailableError(changed_message(file.name))
    for member in alone:
        missing = _("no image") if member.image is None else _("neither text nor JSON")
        unmatched.append(
            _(
                "{path}, member {key} has {missing}",
                path=file.name,
                key=member.key,
                missing=missing,
            )
        )
    arrays = _span_arrays(samples)
    if len(pairs) != len(samples) or any(number >= 0 for _sample, number in pairs):
        columns = np.array(pairs, np.int64).reshape(-1, 2)
        arrays |= {"sample": smallest(columns[:, 0]), "text_number": smallest(columns[:, 1])}
    ids = [""] * len(samples)  # of unreadable samples
    for (number, _text), row in zip(pairs, rows, strict=True):
        if row is not None:
            ids[number] = row.image_id
    arrays |= string_arrays("id", ids)
    arrays |= {"caption_key": captions_of(rows), "length": smallest(lengths_of(rows))}
    write_arrays(to, arrays, {"pairs": len(pairs), "unmatched": unmatched})


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Create millions of objects without searching them for reference cycles again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _span_arrays(samples: Sequence[_Members]) -> dict[str, npt.NDArray[Any]]:
    spans = np.array(
        [
            (
                *(s.image or (0, 0)),
                *(s.part(TEXT_SUFFIXES) or (0, 0)),
                *(s.part(JSON_SUFFIXES) or (0, 0)),
            )
            for s in samples
        ],
        np.int64,
    ).reshape(-1, 6)
    starts, sizes = spans[:, ::2] // BLOCK, spans[:, 1::2]
    arrays = {"image_at": smallest(starts[:, 0]), "image_size": smallest(sizes[:, 0])}
    for column, part in ((1, "text"), (2, "json")):
        gaps = np.where(sizes[:, column] > 0, starts[:, column] - starts[:, 0], 0)
        arrays |= {f"{part}_gap": smallest(gaps), f"{part}_size": smallest(sizes[:, column])}
    named = [number for number, sample in enumerate(samples) if not sample.is_simple]
    arrays |= string_arrays("name", [samples[number].key for number in named])
    return arrays | {"named": smallest(np.array(named, np.int64))}


def _read_samples(
    file: ShardFile, state: FileState, samples: Sequence[_Members], *, unpaired: bool
) -> tuple[list[tuple[int, int]], list[Row | None]]:
    """Return the pairs, as (sample, number of the text), and their rows; None is unreadable."""
    pairs: list[tuple[int, int]] = []
    rows: list[Row | None] = []
    with buffered(file, state) as stream:
        for number, sample in enumerate(samples):
            text, content = (_content(stream, sample.part(part)) for part in _PARTS[1:])
            values = _json(content) if content else {}
            numbers: Sequence[int] = (-1,)
            if content and b'"texts"' in content:
                numbers = range(len(_texts(values))) or (-1,)
            for text_number in numbers:
                pairs.append((number, text_number))
                rows.append(
                    _row_if_readable(values, text, text_number, sample.key, unpaired=unpaired)
                )
    return pairs, rows


def _content(stream: BinaryIO, span: _Span | None) -> bytes | None:
    if span is None or not span[1]:  # as _span
        return None
    stream.seek(span[0])
    return stream.read(span[1])


def _row_if_readable(
    values: Any, text: bytes | None, text_number: int, key: str, *, unpaired: bool
) -> Row | None:
    if not isinstance(values, dict):
        return None
    try:
        return _row(values, text, text_number, lambda: key, lambda: "", unpaired=unpaired)
    except DataError:
        return None


def _collect_members(file: ShardFile, state: FileState, unmatched: list[str]) -> list[_Members]:
    """Group the members of an archive by name.

    A repeated name, as in concatenated archives, starts another sample.
    """
    latest: dict[str, _Members] = {}
    count: Counter[str] = Counter()
    groups: list[_Members] = []
    others: list[Path] = []
    for name, at, size, reason, simple in members(file, state):
        if reason is not None:
            unmatched.append(
                _(
                    "{path}, member {name!r} is skipped: {reason}",
                    path=file.name,
                    name=path_text(name),
                    reason=reason,
                )
            )
            continue
        if simple:
            key, _dot, suffix = name.rpartition(".")
            suffix = f".{suffix}".lower()
        else:
            folder, _slash, base = posixpath.normpath(path_text(name)).rpartition("/")
            stem, suffix = posixpath.splitext(base)
            key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
        if suffix not in _SUFFIXES or (not simple and is_apple_double(Path(base))):
            others.append(Path(posixpath.basename(path_text(name))))  # such as KEY.cls
            continue
        group = latest.get(key)
        if group is None or suffix in group.parts:
            count[key] += 1
            unique = key if count[key] == 1 else f"{key}#{count[key]}"
            group = latest[key] = _Members(unique, is_simple=unique == key)
            groups.append(group)
        group.parts[suffix] = (at, size)
        group.is_simple = group.is_simple and simple
    if skipped := skipped_files(others, (*SUFFIXES, ".cls", ".index"), Path(file.name)):
        unmatched.append(skipped)
    return groups


def _match_samples(by_name: list[_Members]) -> tuple[list[_Members], list[_Members]]:
    """Return the samples, in the order of their first members, and the unmatched members."""
    groups: dict[str, list[_Members]] = {}
    for named in by_name:
        folder, _, base = named.key.rpartition("/")
        key = f"{folder}/{base.partition('.')[0]}" if folder else base.partition(".")[0]
        groups.setdefault(key, []).append(named)
    samples: list[_Members] = []
    alone: list[_Members] = []
    for key, group in groups.items():
        if len(group) == 1 and group[0].image is not None and group[0].has_text:
            samples.append(group[0])
            continue
        complete = [m for m in group if m.image is not None and m.has_text]
        images = [m for m in group if m.image is not None]
        texts = [m for m in group if m.has_text]
        if not complete and len(images) == 1 and texts:
            parts = {suffix: span for m in (*texts, *images) for suffix, span in m.parts.items()}
            if sum(len(m.parts) for m in group) == len(parts):
                samples.append(_Members(key, parts))
                continue
        samples += complete
        # KEY.seg.png next to KEY.jpg is another part of its sample, and not unmatched.
        if not any(m.key == key for m in complete):
            alone += [m for m in group if m.image is None or not m.has_text]
    return samples, alone


def _json(content: bytes) -> Any:
    try:
        return read_json(content)
    except ValueError:
        return None


def _texts(values: Any) -> Sequence[dict[str, str]]:
    """Return the list of texts that ``data.shard`` puts into the JSON; empty otherwise."""
    try:
        texts: Sequence[dict[str, str]] = values["texts"]
        return texts if all(isinstance(t["text"] + t["text_id"], str) for t in texts) else ()
    except (KeyError, TypeError):
        return ()

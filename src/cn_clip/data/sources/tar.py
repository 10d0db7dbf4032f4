"""Tar shards of WebDataset and img2dataset, in random access, without extraction."""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cn_clip.arrays import read_npz
from cn_clip.data.sources.base import Row
from cn_clip.data.sources.index_cache import cached_index
from cn_clip.data.sources.lines import json_object, read_at
from cn_clip.errors import DataError
from cn_clip.files import (
    HEAD,
    MAX_TEXT,
    check_regular,
    is_apple_double,
    skipped_files,
    wrong_format,
)
from cn_clip.image.decode import SUFFIXES
from cn_clip.image.limits import MAX_ENCODED
from cn_clip.text import path_text, read_json
from cn_clip.translation import _

_TEXT, _JSON = (".txt", ".caption"), (".json",)
_SUFFIXES = frozenset((*SUFFIXES, *_TEXT, *_JSON))
_BLOCK = 512
_INDEX_SUFFIX = ".2.npz"  # format version of the index

_MAX_HEADER = 1 << 16  # bytes of a header; the time of tarfile's parser is quadratic in them


class Tar:
    """One shard: members ``KEY.jpg``, ``KEY.txt``, ``KEY.json`` make a sample, in any order.

    KEY is a member's path without its last suffix. Members that do not match this way are matched
    by their names up to the first dot, as in WebDataset: ``KEY.img.jpg`` and ``KEY.cap.txt``.

    The text is ``KEY.txt``, or else ``caption`` or ``text`` in the JSON. A list ``texts`` in the
    JSON, as ``data.shard`` writes it, makes one pair per text. The ids are those in the JSON, or
    else the key.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Open a shard; its index is built once.

        Raises:
            DataError: the tar is incomplete (perhaps still being written) or has no sample.
            CNClipError: the index cannot be written.
        """
        self.name = path_text(name or f"tar:{path}")
        self._path = path
        try:
            check_regular(path)
            index = cached_index(
                path, _INDEX_SUFFIX, lambda to: _write_index(_scan(path), to), _read_index
            )
        except OSError as error:
            raise DataError(
                _("{path} cannot be read: {reason}", path=path, reason=error.strerror)
            ) from None
        self._spans: npt.NDArray[np.int64] = index.spans
        self._pairs: npt.NDArray[np.int32] = index.pairs
        self._keys, self._unmatched = index.keys, index.unmatched
        if not len(self._pairs):
            raise DataError(
                _("{path} holds no image with a text or JSON of the same name", path=path)
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def row(self, index: int) -> Row:
        sample, text_number = self._pairs[index].tolist()
        key = self._keys[sample]
        _unused, _unused, text_at, text_size, json_at, json_size = self._spans[sample].tolist()
        values: dict[str, Any] = {}
        if json_size:
            content = read_at(self._path, json_at, json_size)
            values = json_object(content, _("the JSON of {where}", where=self.where(index)))
        image_id = str(values.get("image_id", values.get("key", key)))
        if text_number >= 0:
            texts = _texts(values)
            if text_number >= len(texts):
                raise DataError(
                    _(
                        "{where} has changed since it was opened; start again",
                        where=self.where(index),
                    )
                )
            return Row(texts[text_number]["text"], image_id, texts[text_number]["text_id"])
        text = values.get("caption", values.get("text"))
        if text_size:
            try:
                text = read_at(self._path, text_at, text_size).decode("utf-8-sig")
            except UnicodeDecodeError:
                raise DataError(
                    _("{where}: its text is not UTF-8; pack it again", where=self.where(index))
                ) from None
        if not isinstance(text, str):
            raise DataError(
                _(
                    "{where}: its caption is {text!r:.40}; expected a string",
                    where=self.where(index),
                    text=text,
                )
            )
        return Row(text.strip("\r\n"), image_id, str(values.get("text_id", image_id)))

    def image(self, index: int) -> bytes:
        start, size = self._spans[self._pairs[index, 0], :2].tolist()
        return read_at(self._path, start, size)

    def where(self, index: int) -> str:
        return _(
            "{path}, member {key}",
            path=path_text(self._path),
            key=self._keys[self._pairs[index, 0]],
        )

    def unmatched(self) -> list[str]:
        return self._unmatched


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
class _Index:
    """The index of a shard of S samples and N pairs.

    Attributes:
        keys: (S,) keys.
        spans: (S, 6) offset and size of image, text and JSON.
        pairs: (N, 2) sample, and number of the text in its list; -1 without a list.
        unmatched: messages about members without a pair.
    """

    keys: list[str]
    spans: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int32]
    unmatched: list[str]


@dataclass(slots=True)
class _Members:
    """The members of one name: image, text and JSON, by suffix, in archive order."""

    key: str
    parts: dict[str, _Span] = field(default_factory=dict)

    def part(self, suffixes: Sequence[str]) -> _Span | None:
        return next((self.parts[suffix] for suffix in suffixes if suffix in self.parts), None)

    @property
    def image(self) -> _Span | None:
        return self.part(SUFFIXES)

    @property
    def has_text(self) -> bool:
        """Whether there is a text or JSON member."""
        return self.part((*_TEXT, *_JSON)) is not None


def _scan(path: Path) -> _Index:
    try:
        with path.open("rb", buffering=1 << 20) as stream:
            return _build_index(stream, path)
    except OSError as error:
        raise DataError(
            _("{path} cannot be read: {reason}", path=path, reason=error.strerror)
        ) from None


def _build_index(stream: BinaryIO, path: Path) -> _Index:
    unmatched: list[str] = []
    samples, alone = _match_samples(_collect_members(stream, path, unmatched))
    for members in alone:
        missing = _("no image") if members.image is None else _("neither text nor JSON")
        unmatched.append(
            _(
                "{path}, member {key} has {missing}",
                path=path_text(path),
                key=members.key,
                missing=missing,
            )
        )
    spans, pairs = [], []
    for number, sample in enumerate(samples):
        values = sample.part(_JSON) or (0, 0)
        spans.append((*(sample.image or (0, 0)), *(sample.part(_TEXT) or (0, 0)), *values))
        stream.seek(values[0])
        content = stream.read(values[1])
        texts = _texts(_json(content)) if b'"texts"' in content else ()
        pairs += [(number, at) for at in range(len(texts))] or [(number, -1)]
    return _Index(
        [sample.key for sample in samples],
        np.array(spans, np.int64).reshape(-1, 6),
        np.array(pairs, np.int32).reshape(-1, 2),
        unmatched,
    )


def _collect_members(stream: BinaryIO, path: Path, unmatched: list[str]) -> list[_Members]:
    """Group the members of an archive by name.

    A repeated name, as in concatenated archives, starts another sample.
    """
    latest: dict[str, _Members] = {}
    count: Counter[str] = Counter()
    groups: list[_Members] = []
    others: list[Path] = []
    for member in _members(stream, path):
        if reason := _refusal_reason(member):
            name = path_text(member.name)
            unmatched.append(
                _(
                    "{path}, member {name!r} is skipped: {reason}",
                    path=path_text(path),
                    name=name,
                    reason=reason,
                )
            )
            continue
        folder, _unused, base = posixpath.normpath(path_text(member.name)).rpartition("/")
        stem, suffix = posixpath.splitext(base)
        suffix = suffix.lower()
        if suffix not in _SUFFIXES or is_apple_double(Path(base)):  # such as KEY.cls
            others.append(Path(base))
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key not in latest or suffix in latest[key].parts:
            count[key] += 1
            latest[key] = _Members(key if count[key] == 1 else f"{key}#{count[key]}")
            groups.append(latest[key])
        latest[key].parts[suffix] = (member.offset_data, member.size)
    if skipped := skipped_files(others, (*SUFFIXES, ".cls", ".index"), path):
        unmatched.append(skipped)
    return groups


def _match_samples(by_name: list[_Members]) -> tuple[list[_Members], list[_Members]]:
    """Return the samples, in the order of their first members, and the unmatched members."""
    groups: dict[str, list[_Members]] = {}
    for members in by_name:
        folder, _, base = members.key.rpartition("/")
        key = f"{folder}/{base.partition('.')[0]}" if folder else base.partition(".")[0]
        groups.setdefault(key, []).append(members)
    samples: list[_Members] = []
    alone: list[_Members] = []
    for key, group in groups.items():
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


class _BoundedStream:
    """A stream for tarfile that refuses oversized headers and never reads beyond the file."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER:
            raise tarfile.ReadError(_("a header claims {size:,} bytes", size=size))
        return self._stream.read(max(0, min(size, self._size - self._stream.tell())))

    def seek(self, offset: int) -> int:
        return self._stream.seek(min(offset, self._size))


def _members(stream: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield all members but folders; raise if the archive lacks its end marker."""
    size = path.stat().st_size
    if reason := wrong_format(stream.read(HEAD)):
        raise DataError(
            _(
                "{path} is {reason}; pairs are read from an uncompressed .tar",
                path=path,
                reason=reason,
            )
        )
    stream.seek(0)
    bounded: Any = _BoundedStream(stream, size)
    archive = _map_parse_errors(path, lambda: tarfile.TarFile(fileobj=bounded, errorlevel=2))
    end = 0
    while (member := _map_parse_errors(path, archive.next)) is not None:
        archive.members = []  # otherwise gigabytes of TarInfo
        if member.size < 0:  # tarfile would seek backwards forever
            raise DataError(
                _(
                    "{path}, member {name!r} claims {size} bytes",
                    path=path,
                    name=member.name,
                    size=member.size,
                )
            )
        if member.isdir():
            continue
        end = member.offset_data + member.size
        if member.isreg() and end > size:
            break
        yield member
    if size < end + _BLOCK or any(read_at(path, -(-end // _BLOCK) * _BLOCK, _BLOCK)):
        raise DataError(
            _(
                "{path} ends within {name}: it is still being written, or truncated; wait until "
                "it is written, or write it again",
                path=path,
                name=member.name if member else _("its last member"),
            )
        )


def _map_parse_errors(path: Path, read: Callable[[], Any]) -> Any:
    """Run tarfile's parser; on damaged headers it raises many kinds of errors."""
    try:
        return read()
    except Exception as error:
        raise DataError(
            _(
                "{path} is not a complete tar file: {error}; write it again",
                path=path,
                error=error or type(error).__name__,
            )
        ) from None


def _refusal_reason(member: tarfile.TarInfo) -> str | None:
    if member.islnk():
        return _(
            "it is a hard link to {target!r}; pack it as a file", target=path_text(member.linkname)
        )
    if not member.isreg() or member.issparse():
        return _("it is a link, a device or sparse, not a regular file")
    if member.name.startswith(("/", "\\")) or ".." in member.name.replace("\\", "/").split("/"):
        return _("its path leads outside of the archive")
    if "\n" in member.name:
        return _("its name has a line break")
    limit = MAX_TEXT if member.name.lower().endswith((*_TEXT, *_JSON)) else MAX_ENCODED
    if member.size > limit:
        return _(
            "it has {size:,} bytes, above the limit of {limit:,}", size=member.size, limit=limit
        )
    return None


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


def _write_index(index: _Index, path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(
            stream,
            spans=index.spans,
            pairs=index.pairs,
            keys=np.frombuffer("\n".join(index.keys).encode(), np.uint8),
            unmatched=np.frombuffer(json.dumps(index.unmatched).encode(), np.uint8),
        )


def _read_index(path: Path) -> _Index:
    stored = read_npz(path, ("keys", "spans", "pairs", "unmatched"))
    keys = bytes(stored["keys"]).decode().split("\n")
    return _Index(keys, stored["spans"], stored["pairs"], json.loads(bytes(stored["unmatched"])))

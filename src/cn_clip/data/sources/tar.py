"""Tar shards as WebDataset and img2dataset write them, read in any order and never extracted."""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cn_clip.arrays import read_npz
from cn_clip.data.sources.base import Row
from cn_clip.data.sources.index_cache import cached
from cn_clip.data.sources.lines import json_object, read_at
from cn_clip.errors import DataError
from cn_clip.files import MAX_FILE, MAX_TEXT, check_plain, mistaken, passed_over
from cn_clip.image.decode import SUFFIXES
from cn_clip.text import path_text, read_json

_TEXT, _JSON = (".txt", ".caption"), (".json",)
_PARTS = frozenset((*SUFFIXES, *_TEXT, *_JSON))
_BLOCK = 512
_FORMAT = ".2.npz"  # of the index; another one is built anew

_HEADER = 1 << 16  # bytes of a header; the parser of tarfile takes their square in time


class Tar:
    """One shard: members ``KEY.jpg``, ``KEY.txt``, ``KEY.json`` make a sample, in any order.

    KEY is a member's path without its last suffix. Members that have no partner so, but one up to
    the first dot of their names, as WebDataset has it, make a sample as well: ``KEY.img.jpg`` and
    ``KEY.cap.txt``.

    The text is that of ``KEY.txt``, else ``caption`` or ``text`` in the JSON. A list ``texts`` in
    the JSON, as ``write_shard`` writes it, makes a pair of each. The ids are those in the JSON,
    else the key.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Open a shard by its index, which is built once.

        Raises:
            DataError: it is no whole tar, one still being written say, or holds no sample.
            CNClipError: there is no place to write the index.
        """
        self.name = path_text(name or f"tar:{path}")
        self._path = path
        try:
            check_plain(path)
            index = cached(path, _FORMAT, lambda to: _write_index(_scan(path), to), _read_index)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        self._spans: npt.NDArray[np.int64] = index.spans
        self._pairs: npt.NDArray[np.int32] = index.pairs
        self._keys, self._unmatched = index.keys, index.unmatched
        if not len(self._pairs):
            raise DataError(f"{path} holds no picture with a text or JSON of the same name")

    def __len__(self) -> int:
        return len(self._pairs)

    def row(self, index: int) -> Row:
        sample, which = self._pairs[index].tolist()
        key = self._keys[sample]
        _, _, text_at, text_size, json_at, json_size = self._spans[sample].tolist()
        values: dict[str, Any] = {}
        if json_size:
            content = read_at(self._path, json_at, json_size)
            values = json_object(content, f"the JSON of {self.where(index)}")
        image_id = str(values.get("image_id", values.get("key", key)))
        if which >= 0:
            texts = _texts(values)
            if which >= len(texts):
                raise DataError(f"{self.where(index)} has changed since it was opened; start again")
            return Row(texts[which]["text"], image_id, texts[which]["text_id"])
        text = values.get("caption", values.get("text"))
        if text_size:
            try:
                text = read_at(self._path, text_at, text_size).decode("utf-8-sig")
            except UnicodeDecodeError:
                raise DataError(
                    f"{self.where(index)}: its text is not UTF-8; pack it anew"
                ) from None
        if not isinstance(text, str):
            raise DataError(f"{self.where(index)}: its caption is {text!r:.40}; expected a string")
        return Row(text.strip("\r\n"), image_id, str(values.get("text_id", image_id)))

    def image(self, index: int) -> bytes:
        start, size = self._spans[self._pairs[index, 0], :2].tolist()
        return read_at(self._path, start, size)

    def where(self, index: int) -> str:
        return f"{path_text(self._path)}, member {self._keys[self._pairs[index, 0]]}"

    def unmatched(self) -> list[str]:
        return self._unmatched


@dataclass(slots=True)
class Sample:
    """What a shard holds of one picture: its bytes, their suffix, and its texts with their ids."""

    image: bytes
    suffix: str
    image_id: str
    texts: list[tuple[str, str]]
    """(text_id, text)"""


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write a tar that WebDataset reads too; the same samples give the same bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, sample in enumerate(samples):
            values: dict[str, Any] = {"image_id": sample.image_id}
            texts = [{"text_id": text_id, "text": text} for text_id, text in sample.texts]
            values |= {"texts": texts} if len(texts) > 1 else texts[0]
            members = {
                sample.suffix: sample.image,
                ".txt": sample.texts[0][1].encode(),
                ".json": json.dumps(values, ensure_ascii=False).encode(),
            }
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{number:08}{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


_Span = tuple[int, int]  # offset and size


@dataclass(slots=True)
class _Index:
    """Of every sample: key, and (offset, size) of picture, text and JSON; of every pair: sample
    and which of its texts, -1 if it has but one."""

    keys: list[str]
    spans: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int32]
    unmatched: list[str]


@dataclass(slots=True)
class _Group:
    """The members of one name: image, text and JSON, by suffix, in the order they were met."""

    key: str
    parts: dict[str, _Span] = field(default_factory=dict)

    def part(self, suffixes: Sequence[str]) -> _Span | None:
        return next((self.parts[each] for each in suffixes if each in self.parts), None)

    @property
    def image(self) -> _Span | None:
        return self.part(SUFFIXES)

    @property
    def has_text(self) -> bool:
        """Whether there is a text or JSON."""
        return self.part((*_TEXT, *_JSON)) is not None


def _scan(path: Path) -> _Index:
    try:
        with path.open("rb", buffering=1 << 20) as stream:
            return _indexed(stream, path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _indexed(stream: BinaryIO, path: Path) -> _Index:
    unmatched: list[str] = []
    samples, alone = _matched(_gathered(stream, path, unmatched))
    for each in alone:
        lacks = "no picture" if each.image is None else "neither text nor JSON"
        unmatched.append(f"{path_text(path)}, member {each.key} has {lacks}")
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


def _gathered(stream: BinaryIO, path: Path, unmatched: list[str]) -> list[_Group]:
    """Return the members of each name, wherever they stand in the archive.

    A name that comes again, as in archives joined to one, begins another sample.
    """
    latest: dict[str, _Group] = {}
    count: Counter[str] = Counter()
    found: list[_Group] = []
    others: list[Path] = []
    for member in _members(stream, path):
        if refused := _refused(member):
            name = path_text(member.name)
            unmatched.append(f"{path_text(path)}, member {name!r} is left out: {refused}")
            continue
        folder, _, base = posixpath.normpath(path_text(member.name)).rpartition("/")
        stem, suffix = posixpath.splitext(base)
        suffix = suffix.lower()
        if suffix not in _PARTS or base.startswith("._"):  # KEY.cls, and what macOS adds
            others.append(Path(base))
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key not in latest or suffix in latest[key].parts:
            count[key] += 1
            latest[key] = _Group(key if count[key] == 1 else f"{key}#{count[key]}")
            found.append(latest[key])
        latest[key].parts[suffix] = (member.offset_data, member.size)
    if passed := passed_over(others, (".cls", ".index"), path):
        unmatched.append(passed)
    return found


def _matched(found: list[_Group]) -> tuple[list[_Group], list[_Group]]:
    """Return the samples, in the order of their first members, and the names that make none."""
    groups: dict[str, list[_Group]] = {}
    for each in found:
        folder, _, base = each.key.rpartition("/")
        key = f"{folder}/{base.partition('.')[0]}" if folder else base.partition(".")[0]
        groups.setdefault(key, []).append(each)
    samples: list[_Group] = []
    alone: list[_Group] = []
    for key, group in groups.items():
        whole = [each for each in group if each.image is not None and each.has_text]
        images = [each for each in group if each.image is not None]
        texts = [each for each in group if each.has_text]
        if not whole and len(images) == 1 and texts:
            parts = {
                suffix: span for each in (*texts, *images) for suffix, span in each.parts.items()
            }
            if sum(len(each.parts) for each in group) == len(parts):
                samples.append(_Group(key, parts))
                continue
        samples += whole
        # Beside KEY.jpg, KEY.seg.png is another part of its sample.
        if not any(each.key == key for each in whole):
            alone += [each for each in group if each.image is None or not each.has_text]
    return samples, alone


class _Within:
    """A stream for headers, which may claim any size: it never reads, or reserves memory, beyond
    its end."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        if size > _HEADER:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        return self._stream.read(max(0, min(size, self._size - self._stream.tell())))

    def seek(self, offset: int) -> int:
        return self._stream.seek(min(offset, self._size))


def _members(stream: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the regular members and links; raise unless the archive is closed as it should be."""
    size = path.stat().st_size
    if what := mistaken(stream.read(32)):
        raise DataError(f"{path} is {what}; pairs are read out of a plain .tar")
    stream.seek(0)
    within: Any = _Within(stream, size)
    archive = _parsed(path, lambda: tarfile.TarFile(fileobj=within, errorlevel=2))
    end = 0
    while (member := _parsed(path, archive.next)) is not None:
        archive.members = []  # kept, they are gigabytes
        if member.size < 0:  # the next header would be looked for backwards, for ever
            raise DataError(f"{path}, member {member.name!r} claims {member.size} bytes")
        if member.isdir():
            continue
        end = member.offset_data + member.size
        if member.isreg() and end > size:
            break
        yield member
    if size < end + _BLOCK or any(read_at(path, -(-end // _BLOCK) * _BLOCK, _BLOCK)):
        raise DataError(
            f"{path} ends within {member.name if member else 'its last member'}: it is still "
            "being written, or was cut off; wait for its end, or make it anew"
        )


def _parsed(path: Path, read: Callable[[], Any]) -> Any:
    """Run the tar parser over the bytes of a file; damaged headers make it raise many kinds."""
    try:
        return read()
    except Exception as error:
        raise DataError(
            f"{path} is not a whole tar file: {error or type(error).__name__}; make it anew"
        ) from None


def _refused(member: tarfile.TarInfo) -> str | None:
    if member.islnk():
        return f"it is a hard link to {path_text(member.linkname)!r}; pack it as a file"
    if not member.isreg() or member.issparse():
        return "it is a link, a device or sparse, not a plain file"
    if member.name.startswith(("/", "\\")) or ".." in member.name.replace("\\", "/").split("/"):
        return "its name leads out of the archive"
    if "\n" in member.name:
        return "its name has a line break"
    limit = MAX_TEXT if member.name.lower().endswith((*_TEXT, *_JSON)) else MAX_FILE
    if member.size > limit:
        return f"it has {member.size:,} bytes, above the limit of {limit:,}"
    return None


def _json(content: bytes) -> Any:
    try:
        return read_json(content)
    except ValueError:
        return None


def _texts(values: Any) -> Sequence[dict[str, str]]:
    """Return the list of texts in a sample's JSON, if it is one as ``write_shard`` writes it."""
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

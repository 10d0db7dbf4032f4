"""Tar shards as WebDataset and img2dataset write them, read in any order and never extracted."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.data.cache import index_path
from cn_clip.data.lines import json_object, read_at
from cn_clip.data.pair import Row
from cn_clip.errors import DataError
from cn_clip.image import SUFFIXES
from cn_clip.publish import published

_TEXT, _JSON = (".txt", ".caption"), (".json",)
_LARGEST = 1 << 30  # bytes of a member; a picture of this size is none
_BLOCK = 512


class Tar:
    """One shard: members ``KEY.jpg``, ``KEY.txt``, ``KEY.json`` side by side make a sample.

    The text is that of ``KEY.txt``, else ``caption`` or ``text`` in the JSON. A list ``texts`` in
    the JSON, as ``write_shard`` writes it, makes a pair of each. The ids are those in the JSON,
    else the key.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Open a shard by its index, which is built once.

        Raises:
            DataError: it is no whole tar, one still being written say, or holds no sample.
        """
        self.name = name or f"tar:{path}"
        self._path = path
        try:
            index = index_path(path, ".npz")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        if not index.is_file():
            _write_index(_scan(path), index)
        with np.load(index) as stored:
            self._spans: npt.NDArray[np.int64] = stored["spans"]
            self._pairs: npt.NDArray[np.int32] = stored["pairs"]
            self._keys = bytes(stored["keys"]).decode().split("\n")
            self._unmatched: list[str] = json.loads(bytes(stored["unmatched"]))
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
            own = values["texts"][which]
            return Row(own["text"], image_id, own["text_id"])
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
        return f"{self._path}, member {self._keys[self._pairs[index, 0]]}"

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


@dataclass(slots=True)
class _Index:
    """Of every sample: key, and (offset, size) of picture, text and JSON; of every pair: sample
    and which of its texts, -1 if it has but one."""

    keys: list[str] = field(default_factory=list)
    spans: list[tuple[int, ...]] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)


def _scan(path: Path) -> _Index:
    index = _Index()
    held: dict[str, tuple[int, int]] = {}
    current = None
    try:
        with path.open("rb", buffering=1 << 20) as stream:
            for member in _members(stream, path):
                refused = _refused(member)
                if refused:
                    index.unmatched.append(f"{path}, member {member.name!r} is left out: {refused}")
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if key != current:
                    _close(index, current, held, stream, path)
                    current, held = key, {}
                held[f"{dot}{suffix}".lower()] = (member.offset_data, member.size)
            _close(index, current, held, stream, path)
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a whole tar file: {error}; make it anew") from None
    return index


def _members(stream: Any, path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the regular members and links; raise unless the archive is closed as it should be."""
    size = path.stat().st_size
    with tarfile.open(fileobj=stream, mode="r:", errorlevel=2) as archive:
        end = 0
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # kept, they are gigabytes
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


def _refused(member: tarfile.TarInfo) -> str | None:
    if not member.isreg() or member.issparse():
        return "it is a link, a device or sparse, not a plain file"
    if member.name.startswith(("/", "\\")) or ".." in member.name.replace("\\", "/").split("/"):
        return "its name leads out of the archive"
    if "\n" in member.name:
        return "its name has a line break"
    if member.size > _LARGEST:
        return f"it has {member.size:,} bytes, above the limit of {_LARGEST:,}"
    return None


def _close(
    index: _Index, key: str | None, held: dict[str, tuple[int, int]], stream: Any, path: Path
) -> None:
    """Add the members of one key to the index, as the pairs that they make."""
    if key is None:
        return
    image, text, values = (_first(held, each) for each in (SUFFIXES, _TEXT, _JSON))
    if image is None or (text is None and values is None):
        lacks = "no picture" if image is None else "neither text nor JSON"
        index.unmatched.append(f"{path}, member {key} has {lacks}")
        return
    texts: Sequence[Any] = ()
    if values is not None:
        back = stream.tell()
        stream.seek(values[0])
        content = stream.read(values[1])
        stream.seek(back)
        texts = _texts(content) if b'"texts"' in content else ()
    sample = len(index.keys)
    index.keys.append(key)
    index.spans.append((*image, *(text or (0, 0)), *(values or (0, 0))))
    index.pairs += [(sample, at) for at in range(len(texts))] or [(sample, -1)]


def _texts(content: bytes) -> Sequence[Any]:
    """Return the list of texts in a sample's JSON, if it is one as ``write_shard`` writes it."""
    try:
        texts = json.loads(content)["texts"]
        return texts if all(isinstance(t["text"] + t["text_id"], str) for t in texts) else ()
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()


def _first(held: dict[str, tuple[int, int]], suffixes: Sequence[str]) -> tuple[int, int] | None:
    return next((held[suffix] for suffix in suffixes if suffix in held), None)


def _write_index(index: _Index, path: Path) -> None:
    with published(path) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            spans=np.array(index.spans, np.int64).reshape(-1, 6),
            pairs=np.array(index.pairs, np.int32).reshape(-1, 2),
            keys=np.frombuffer("\n".join(index.keys).encode(), np.uint8),
            unmatched=np.frombuffer(json.dumps(index.unmatched).encode(), np.uint8),
        )

"""The official package's formats: TSV of base64 pictures with JSON Lines of texts, and LMDB."""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
import pickle
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from cn_clip.data.archive import Sample
from cn_clip.data.lines import Lines
from cn_clip.data.pair import Row
from cn_clip.errors import DataError, UsageError

_ID_BYTES = 256  # an id longer than this is none


class Tsv:
    """``X_imgs.tsv`` (id, tab, base64) and ``X_texts.jsonl`` (``{"text_id", "text",
    "image_ids"}``); each of a text's images makes a pair.

    With ``unpaired``, pictures and texts without the other are rows too, of an empty text or an
    empty image id: enough to compare with, never to train on.
    """

    def __init__(
        self,
        name: str,
        images: Path,
        texts: Path | None = None,
        encoding: str | None = None,
        *,
        unpaired: bool = False,
    ) -> None:
        self.name = name
        self._unpaired = unpaired
        texts = texts or images.with_name(f"{images.name.removesuffix('_imgs.tsv')}_texts.jsonl")
        if not texts.is_file():
            raise DataError(f"{name}: no texts at {texts}; name them with ?texts=FILE.jsonl")
        self._images, self._texts = Lines(images), Lines(texts, encoding=encoding)
        places: dict[str, int] = {}
        self._repeated: dict[str, str] = {}
        for line in range(len(self._images)):
            image_id = _image_id(self._images, line)
            if image_id in places:
                self._repeated[image_id] = self._images.where(line)
            places.setdefault(image_id, line)
        self._places = places
        pairs, wanted = [], Counter[str]()
        for line in range(len(self._texts)):
            ids = self._ids(line)
            wanted.update(ids)
            pairs += [(line, at) for at in range(len(ids))] or [(line, -1)]
        if not pairs:
            raise DataError(f"{name}: {texts} holds no text")
        self._unused = [each for each in places if each not in wanted]
        if unpaired:
            pairs += [(-1, places[each]) for each in self._unused]
            self._unused = []
        self._pairs = np.array(pairs, dtype=np.int32).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._pairs)

    def row(self, index: int) -> Row:
        line, at = self._pairs[index].tolist()
        if line < 0:
            return Row("", _image_id(self._images, at), "")
        values = self._values(line)
        alone = values.get("image_ids") == []
        if not isinstance(values.get("text"), str) or (at < 0 and not (alone and self._unpaired)):
            remedy = "; a test set to compare with may lack them: add ?unpaired=yes"
            raise DataError(
                f'{self.where(index)}: expected {{"text_id": 1, "text": "...", "image_ids": [1]}}'
                + (f", found no image ids{remedy}" if alone else "")
            )
        image_id = "" if at < 0 else str(values["image_ids"][at])
        return Row(values["text"], image_id, str(values.get("text_id", line)))

    def image(self, index: int) -> bytes:
        image_id = self.row(index).image_id
        if not image_id:
            raise DataError(f"{self.where(index)}: its text belongs to no picture")
        if image_id not in self._places:
            raise DataError(
                f"{self.where(index)}: no picture has the id {image_id!r} in {self._images.path}"
            )
        line = self._places[image_id]
        if image_id in self._repeated:
            raise DataError(
                f"{self.where(index)}: the picture id {image_id!r} stands twice, in "
                f"{self._images.where(line)} and {self._repeated[image_id]}; keep one of them"
            )
        encoded = self._images.raw(line).partition(b"\t")[2]
        return _decoded(encoded, self._images.where(line))

    def where(self, index: int) -> str:
        line, at = self._pairs[index].tolist()
        return self._images.where(at) if line < 0 else self._texts.where(line)

    def unmatched(self) -> list[str]:
        return [f"the picture {i!r} of {self._images.path} has no text" for i in self._unused]

    def _values(self, line: int) -> dict[str, Any]:
        try:
            values = json.loads(self._texts[line])
        except (ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self._texts.where(line)} is not JSON: {error}") from None
        return values if isinstance(values, dict) else {}

    def _ids(self, line: int) -> list[str]:
        try:
            ids = self._values(line).get("image_ids")
        except DataError:
            return []  # a row all the same, which says so when it is read
        return [str(each) for each in ids] if isinstance(ids, list) else []


class Lmdb:
    """A folder with ``imgs`` and ``pairs``. Its pickles may hold tuples of numbers and strings;
    anything that names a class or function is refused, and never run."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self._root = root
        for part in ("imgs", "pairs"):
            if not (root / part / "data.mdb").is_file():
                raise DataError(f"{name}: no LMDB at {root / part}; a source holds imgs and pairs")
        self._size = int(self._get("pairs", "num_samples", "its count of pairs"))

    def __len__(self) -> int:
        return self._size

    def row(self, index: int) -> Row:
        raw = self._get("pairs", str(index), self.where(index))
        try:
            image_id, text_id, text = _Plain(io.BytesIO(raw)).load()
        except Exception as error:  # these bytes may be anything, and so may what they raise
            raise DataError(f"{self.where(index)} is refused: {error}") from None
        if not isinstance(text, str):
            raise DataError(f"{self.where(index)}: its text is {text!r:.40}; expected a string")
        return Row(text, str(image_id), str(text_id))

    def image(self, index: int) -> bytes:
        image_id = self.row(index).image_id
        return _decoded(self._get("imgs", image_id, self.where(index)), self.where(index))

    def where(self, index: int) -> str:
        return f"{self._root / 'pairs'}, key {index}"

    def unmatched(self) -> list[str]:
        told = int(self._get("imgs", "num_images", "its count of pictures"))
        held = _environment(self._root / "imgs", os.getpid()).stat()["entries"] - 1
        return [] if told == held else [f"{self._root}: {told} pictures promised, {held} there"]

    def _get(self, part: str, key: str, what: str) -> bytes:
        with _environment(self._root / part, os.getpid()).begin() as transaction:
            found = transaction.get(key.encode())
        if found is None:
            raise DataError(f"{what}: no key {key!r} in {self._root / part}")
        return bytes(found)


@cache
def _environment(folder: Path, _process: int) -> Any:
    """Open an LMDB once in a process, as it must be; not across a fork, which it does not bear."""
    lmdb = _library()
    try:
        return lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise DataError(f"{folder} is not a whole LMDB: {error}") from None


def _library() -> Any:
    try:
        return import_module("lmdb")
    except ImportError:
        raise UsageError("LMDB needs lmdb: pip install 'cn-clip[data]'") from None


class _Plain(pickle.Unpickler):
    """Loads tuples, lists, numbers and strings; can build nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"its pickle names {module}.{name}, and only data is read")

    def persistent_load(self, reference: Any) -> Any:
        raise pickle.UnpicklingError("its pickle refers to something outside")


def _image_id(images: Lines, line: int) -> str:
    head, tab, _ = images.raw(line, _ID_BYTES).partition(b"\t")
    if not tab:
        raise DataError(
            f"{images.where(line)}: expected an id, a tab and base64, found {head[:40]!r}"
        )
    return head.removeprefix(b"\xef\xbb\xbf").decode(errors="replace")


def _decoded(encoded: bytes, where: str) -> bytes:
    """Read base64 of either alphabet."""
    try:
        return base64.b64decode(encoded.strip().translate(bytes.maketrans(b"-_", b"+/")))
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: its picture is not base64: {error}") from None


def write_tsv(folder: Path, samples: Iterable[Sample], *, split: str) -> None:
    """Write ``SPLIT_imgs.tsv`` and ``SPLIT_texts.jsonl`` into a folder."""
    with (
        (folder / f"{split}_imgs.tsv").open("wb") as images,
        (folder / f"{split}_texts.jsonl").open("w", encoding="utf-8") as texts,
    ):
        for sample in samples:
            images.write(sample.image_id.encode() + b"\t" + base64.b64encode(sample.image) + b"\n")
            for text_id, text in sample.texts:
                image_ids = [plain_id(sample.image_id)]
                line = {"text_id": plain_id(text_id), "text": text, "image_ids": image_ids}
                texts.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_lmdb(folder: Path, samples: Iterable[Sample]) -> None:
    """Write the LMDBs ``imgs`` and ``pairs`` into a folder; they grow with what they hold."""
    images, pairs = (_Growing(folder / part) for part in ("imgs", "pairs"))
    count = total = 0
    with images, pairs:
        for sample in samples:
            images.put(sample.image_id.encode(), base64.b64encode(sample.image))
            total += 1
            for text_id, text in sample.texts:
                pair = (plain_id(sample.image_id), plain_id(text_id), text)
                pairs.put(str(count).encode(), pickle.dumps(pair))
                count += 1
        images.put(b"num_images", str(total).encode())
        pairs.put(b"num_samples", str(count).encode())


class _Growing:
    """An LMDB that is written once, in order, and doubles its space when that is used up."""

    def __init__(self, folder: Path) -> None:
        self._lmdb = _library()
        self._size = 1 << 24
        folder.mkdir()
        self._environment = self._lmdb.open(str(folder), map_size=self._size, lock=False)
        self._waiting: list[tuple[bytes, bytes]] = []
        self._bytes = 0

    def __enter__(self) -> _Growing:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()
        self._environment.close()

    def put(self, key: bytes, value: bytes) -> None:
        self._waiting.append((key, value))
        self._bytes += len(value)
        if self._bytes > 1 << 23:
            self._write()

    def _write(self) -> None:
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, value in self._waiting:
                        transaction.put(key, value)
                break
            except self._lmdb.MapFullError:
                self._size *= 2
                self._environment.set_mapsize(self._size)
            except self._lmdb.Error as error:
                raise OSError(str(error)) from error
        self._waiting.clear()
        self._bytes = 0


def plain_id(given: str) -> int | str:
    """Official ids are numbers; ``007`` is a string, so that it comes out as it went in."""
    canonical = given.isascii() and given.isdigit() and str(int(given)) == given
    return int(given) if canonical else given

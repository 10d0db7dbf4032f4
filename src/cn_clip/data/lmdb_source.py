"""The official package's LMDB: read in any order, and written."""

from __future__ import annotations

import base64
import io
import os
import pickle
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from cn_clip.data.archive import Sample
from cn_clip.data.official import decoded_base64, plain_id
from cn_clip.data.pair import Row
from cn_clip.errors import DataError, UsageError


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
        return decoded_base64(self._get("imgs", image_id, self.where(index)), self.where(index))

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

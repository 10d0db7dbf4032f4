"""The official package's LMDB: read in any order, and written."""

from __future__ import annotations

import base64
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from cn_clip.data.sources.base import Row
from cn_clip.data.sources.lmdb_file import LmdbFile
from cn_clip.data.sources.official import decoded_base64, plain_id
from cn_clip.data.sources.pickled_pair import unpickled_pair
from cn_clip.data.sources.tar import Sample
from cn_clip.errors import DataError, UsageError

_IMAGES, _SAMPLES = "num_images", "num_samples"  # the keys of the counts
_MAX_KEY = 511  # bytes, LMDB's own
_PAIR_BYTES = 24  # of the smallest pair in a page: its node, key and pickle


class Lmdb:
    """A folder with the LMDBs ``imgs`` (id to base64) and ``pairs`` (number to a pickled tuple).

    Neither the lmdb library nor pickle reads them: see ``lmdb_file`` and ``pickled``.
    """

    def __init__(self, name: str, root: Path) -> None:
        """Check both files and read the count of pairs.

        Raises:
            DataError: one of them is not there or damaged, or there is no pair.
        """
        self.name = name
        self._root = root
        for part in ("imgs", "pairs"):
            if not (root / part / "data.mdb").is_file():
                raise DataError(f"{name}: no LMDB at {root / part}; a source holds imgs and pairs")
        self._images, self._pairs = (
            LmdbFile(root / part / "data.mdb") for part in ("imgs", "pairs")
        )
        self._size = self._count(self._pairs, _SAMPLES)
        if not self._size:
            raise DataError(f"{name}: {root / 'pairs'} holds no pair")
        if self._size > self._pairs.size // _PAIR_BYTES:  # memory is reserved by the count
            raise DataError(
                f"{root / 'pairs'}: {_SAMPLES} is {self._size:,}, more than a file of "
                f"{self._pairs.size:,} bytes can hold; write it anew"
            )

    def __len__(self) -> int:
        return self._size

    def row(self, index: int) -> Row:
        raw = self._get(self._pairs, str(index), self.where(index))
        try:
            image_id, text_id, text = unpickled_pair(raw)
        except ValueError as error:
            raise DataError(f"{self.where(index)} is refused: {error}") from None
        return Row(text, str(image_id), str(text_id))

    def image(self, index: int) -> bytes:
        where = self.where(index)
        return decoded_base64(self._get(self._images, self.row(index).image_id, where), where)

    def where(self, index: int) -> str:
        return f"{self._root / 'pairs'}, key {index}"

    def unmatched(self) -> list[str]:
        try:
            promised, held = self._count(self._images, _IMAGES), self._images.entries - 1
        except DataError as error:
            return [str(error)]
        if promised == held:
            return []
        return [f"{self._root}: {promised} pictures promised, {held} there"]

    def _count(self, file: LmdbFile, key: str) -> int:
        raw = self._get(file, key, str(file.path.parent))
        if not re.fullmatch(rb"\d{1,18}", raw):
            raise DataError(f"{file.path.parent}: {key} is {raw[:40]!r}; expected a count")
        return int(raw)

    def _get(self, file: LmdbFile, key: str, where: str) -> bytes:
        found = file.get(key.encode(errors="surrogatepass"))
        if found is None:
            raise DataError(f"{where}: no key {key!r} in {file.path.parent}")
        return found


def write_lmdb(folder: Path, samples: Iterable[Sample]) -> None:
    """Write the LMDBs ``imgs`` and ``pairs`` into a folder; they grow with what they hold."""
    images, pairs = (_Growing(folder / part) for part in ("imgs", "pairs"))
    count = total = 0
    with images, pairs:
        for sample in samples:
            if sample.image_id == _IMAGES:
                raise DataError(f"an LMDB keeps {_IMAGES} for itself; give that image another id")
            images.put(sample.image_id.encode(), base64.b64encode(sample.image))
            total += 1
            for text_id, text in sample.texts:
                pair = (plain_id(sample.image_id), plain_id(text_id), text)
                pairs.put(str(count).encode(), pickle.dumps(pair))
                count += 1
        images.put(_IMAGES.encode(), str(total).encode())
        pairs.put(_SAMPLES.encode(), str(count).encode())


class _Growing:
    """An LMDB that is written once, in order, and doubles its space when that is used up."""

    def __init__(self, folder: Path) -> None:
        self._lmdb = _library()
        self._size = 1 << 24
        folder.mkdir()
        with self._named():
            self._environment = self._lmdb.open(str(folder), map_size=self._size, lock=False)
        self._waiting: list[tuple[bytes, bytes]] = []
        self._bytes = 0

    def __enter__(self) -> _Growing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._write()
        finally:
            self._environment.close()

    def put(self, key: bytes, value: bytes) -> None:
        if not 0 < len(key) <= _MAX_KEY:
            raise DataError(
                f"the id {key.decode(errors='replace')!r} has {len(key)} bytes, and a key of an "
                f"LMDB 1 to {_MAX_KEY}; write tar or tsv instead"
            )
        self._waiting.append((key, value))
        self._bytes += len(value)
        if self._bytes > 1 << 23:
            self._write()

    def _write(self) -> None:
        with self._named():
            while not self._fits():
                self._size *= 2
                self._environment.set_mapsize(self._size)
        self._waiting.clear()
        self._bytes = 0

    def _fits(self) -> bool:
        """Write what waits; return whether there was room for it."""
        try:
            with self._environment.begin(write=True) as transaction:
                for key, value in self._waiting:
                    transaction.put(key, value)
        except self._lmdb.MapFullError:
            return False
        return True

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn lmdb's errors, of a full disk say, into an ``OSError``."""
        try:
            yield
        except self._lmdb.Error as error:
            raise OSError(str(error)) from error


def _library() -> Any:
    try:
        return import_module("lmdb")
    except ImportError:
        raise UsageError("to write an LMDB needs lmdb: pip install 'cn-clip[data]'") from None

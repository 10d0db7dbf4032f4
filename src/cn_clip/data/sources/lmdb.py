"""Read and write the LMDBs of the official package."""

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
from cn_clip.data.sources.official import decode_base64, parse_id
from cn_clip.data.sources.pickled_pair import parse_pickled_pair
from cn_clip.data.sources.tar import Sample
from cn_clip.errors import DataError, UsageError
from cn_clip.install import install_command
from cn_clip.translation import _

_IMAGES, _SAMPLES = "num_images", "num_samples"  # keys of the counts
_MAX_KEY = 511  # bytes, LMDB's limit
_PAIR_BYTES = 24  # minimum size of a pair in a page: node, key and pickle


class Lmdb:
    """A folder of the LMDBs ``imgs`` (id -> base64) and ``pairs`` (index -> pickled tuple).

    They are read without the lmdb library and without pickle: see ``lmdb_file`` and
    ``pickled_pair``.
    """

    def __init__(self, name: str, root: Path) -> None:
        """Check both files and read the number of pairs.

        Raises:
            DataError: a file is missing or damaged, or there are no pairs.
        """
        self.name = name
        self._root = root
        for part in ("imgs", "pairs"):
            if not (root / part / "data.mdb").is_file():
                raise DataError(
                    _(
                        "{name}: no LMDB at {folder}; expected imgs and pairs",
                        name=name,
                        folder=root / part,
                    )
                )
        self._images, self._pairs = (
            LmdbFile(root / part / "data.mdb") for part in ("imgs", "pairs")
        )
        self._size = self._count(self._pairs, _SAMPLES)
        if not self._size:
            raise DataError(_("{name}: {folder} holds no pair", name=name, folder=root / "pairs"))
        if self._size > self._pairs.size // _PAIR_BYTES:  # callers allocate memory by the count
            raise DataError(
                _(
                    "{folder}: {key} is {size:,}, more than a file of {file_size:,} bytes can "
                    "hold; write it again",
                    folder=root / "pairs",
                    key=_SAMPLES,
                    size=self._size,
                    file_size=self._pairs.size,
                )
            )

    def __len__(self) -> int:
        return self._size

    def row(self, index: int) -> Row:
        raw = self._get(self._pairs, str(index), self.where(index))
        try:
            image_id, text_id, text = parse_pickled_pair(raw)
        except ValueError as error:
            raise DataError(
                _("{where} is not a pair: {error}", where=self.where(index), error=error)
            ) from None
        return Row(text, str(image_id), str(text_id))

    def image(self, index: int) -> bytes:
        where = self.where(index)
        return decode_base64(self._get(self._images, self.row(index).image_id, where), where)

    def where(self, index: int) -> str:
        return _("{root}, key {index}", root=self._root / "pairs", index=index)

    def unmatched(self) -> list[str]:
        try:
            expected, stored = self._count(self._images, _IMAGES), self._images.entries - 1
        except DataError as error:
            return [str(error)]
        if expected == stored:
            return []
        return [
            _(
                "{root}: expected {expected} images, found {stored}",
                root=self._root,
                expected=expected,
                stored=stored,
            )
        ]

    def _count(self, file: LmdbFile, key: str) -> int:
        raw = self._get(file, key, str(file.path.parent))
        if not re.fullmatch(rb"\d{1,18}", raw):
            raise DataError(
                _(
                    "{folder}: {key} is {raw!r}; expected a count",
                    folder=file.path.parent,
                    key=key,
                    raw=raw[:40],
                )
            )
        return int(raw)

    def _get(self, file: LmdbFile, key: str, where: str) -> bytes:
        value = file.get(key.encode(errors="surrogatepass"))
        if value is None:
            raise DataError(
                _(
                    "{where}: no key {key!r} in {folder}",
                    where=where,
                    key=key,
                    folder=file.path.parent,
                )
            )
        return value


def is_lmdb(folder: Path) -> bool:
    """Return whether a folder is one LMDB, such as ``imgs``."""
    return (folder / "data.mdb").is_file()


def lmdb_images(folder: Path) -> Iterator[tuple[str, bytes, str]]:
    """Yield the id, the bytes and the location of every image of an LMDB ``imgs``, whether it has
    a text or not. The bytes are empty if they are not base64.

    Raises:
        DataError: the file is damaged.
    """
    for key, value in LmdbFile(folder / "data.mdb").items():
        image_id = key.decode(errors="surrogateescape")
        where = _("{root}, key {index}", root=folder, index=image_id)
        if image_id == _IMAGES:
            continue
        try:
            yield image_id, decode_base64(value, where), where
        except DataError:
            yield image_id, b"", where


def write_lmdb(folder: Path, samples: Iterable[Sample]) -> None:
    """Write the LMDBs ``imgs`` and ``pairs`` into a folder."""
    images, pairs = (_Writer(folder / part) for part in ("imgs", "pairs"))
    count = total = 0
    with images, pairs:
        for sample in samples:
            if sample.image_id == _IMAGES:
                raise DataError(
                    _("the image id {id} is reserved in an LMDB; use another id", id=_IMAGES)
                )
            images.put(sample.image_id.encode(), base64.b64encode(sample.image))
            total += 1
            for text_id, text in sample.texts:
                pair = (parse_id(sample.image_id), parse_id(text_id), text)
                pairs.put(str(count).encode(), pickle.dumps(pair))
                count += 1
        images.put(_IMAGES.encode(), str(total).encode())
        pairs.put(_SAMPLES.encode(), str(count).encode())


class _Writer:
    """Writes a new LMDB; doubles its map size when it is full."""

    def __init__(self, folder: Path) -> None:
        self._lmdb = _library()
        self._size = 1 << 24
        folder.mkdir()
        with self._map_errors():
            self._environment = self._lmdb.open(str(folder), map_size=self._size, lock=False)
        self._buffer: list[tuple[bytes, bytes]] = []
        self._bytes = 0

    def __enter__(self) -> _Writer:
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
                _(
                    "the id {key!r} has {size} bytes; an LMDB key has 1 to {limit}: write tar or "
                    "tsv instead",
                    key=key.decode(errors="replace"),
                    size=len(key),
                    limit=_MAX_KEY,
                )
            )
        self._buffer.append((key, value))
        self._bytes += len(value)
        if self._bytes > 1 << 23:
            self._write()

    def _write(self) -> None:
        with self._map_errors():
            while not self._try_write():
                self._size *= 2
                self._environment.set_mapsize(self._size)
        self._buffer.clear()
        self._bytes = 0

    def _try_write(self) -> bool:
        """Write the buffer; return False if the map is full."""
        try:
            with self._environment.begin(write=True) as transaction:
                for key, value in self._buffer:
                    transaction.put(key, value)
        except self._lmdb.MapFullError:
            return False
        return True

    @contextmanager
    def _map_errors(self) -> Iterator[None]:
        """Turn errors of lmdb, such as a full disk, into an ``OSError``."""
        try:
            yield
        except self._lmdb.Error as error:
            raise OSError(str(error)) from error


def _library() -> Any:
    try:
        return import_module("lmdb")
    except ImportError:
        raise UsageError(
            _("writing an LMDB needs lmdb: {command}", command=install_command("data"))
        ) from None

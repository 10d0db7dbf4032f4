"""Many pictures or texts to a file of embeddings, in parts, so that a break loses little."""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from cn_clip.arrays import read_npz
from cn_clip.embedder import Embedder
from cn_clip.embeddings.files import Features, claim_features, writer_of
from cn_clip.embeddings.inputs import Item, Kind
from cn_clip.errors import CNClipError, DataError, ImageError, UsageError
from cn_clip.publish import (
    LOCK,
    claim,
    entries,
    folder_by,
    json_object_at,
    published,
    remove,
    sweep,
    sweep_beside,
)
from cn_clip.text import path_text, read_json

_PER_PART = {"images": 128, "texts": 16_384}
_ABOUT = "about.json"
_PART = re.compile(r"\d{6}\.npz")
_HALF_WRITTEN = re.compile(rf"{_PART.pattern}|about\.json")


@dataclass(slots=True)
class Extraction:
    """What was done; ``failed`` holds (id, why) of the pictures left out."""

    out: str
    written: int = 0
    embedded: int = 0
    resumed: int = 0
    seconds: float = 0.0
    failed: list[tuple[str | int, str]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Items embedded a second, reading and decoding included."""
        return self.embedded / self.seconds if self.seconds else 0.0


def extract(
    embedder: Embedder,
    kind: Kind,
    items: Iterable[Item],
    out: str | Path,
    *,
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
    tick: Callable[[int], None] = lambda _: None,
) -> Extraction:
    """Embed every item and write unit vectors to ``out``, in the order of the items.

    Finished parts lie in ``OUT.parts`` until ``out`` is written; a second run with the same model
    takes them up, and embeds what is new or changed.

    Args:
        embedder: turns them into vectors.
        kind: what the items are.
        items: from ``cn_clip.embeddings.inputs``.
        out: ``.npz``, ``.jsonl``, or a folder in clip-retrieval's layout.
        inputs: files and folders that the items and the model come from, none of which is touched.
        overwrite: replace ``out``, if this function wrote it, and begin anew.
        tick: called with the number of items just done, for a progress bar.

    Raises:
        UsageError: ``out`` exists, is an input or of no known format, an id is repeated, or the
            parts were begun with another model.
        CNClipError: another process is at it, or the disk is full; finished parts stay.
    """
    out, parts = claim_out(out, inputs=inputs, overwrite=overwrite)
    write = writer_of(out)
    report = Extraction(str(out))
    about = {
        "model": embedder.name,
        "fingerprint": embedder.fingerprint,
        "kind": kind,
        "dim": embedder.dim,
        "normalized": True,
        "logit_scale": embedder.logit_scale,
    }
    try:
        parts.mkdir(parents=True, exist_ok=True)
        with FileLock(parts / LOCK, timeout=0):
            sweep(parts, _HALF_WRITTEN)
            sweep_beside(out)
            store = _Parts(parts, about, anew=overwrite)
            embedded = _embed_all(embedder, kind, items, store, report, tick)
            rows = [(item, place) for item in embedded if (place := store.place(item.key))]
            features = Features(
                kind,
                [item.id for item, _ in rows],
                [item.label for item, _ in rows],
                embedder.dim,
                lambda start, end: store.rows([place for _, place in rows[start:end]]),
                about,
            )
            write(features, out)
            report.written = len(rows)
            remove(parts, _own_parts(parts))
        (parts / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # somebody put a file there
            parts.rmdir()
    except Timeout:
        raise CNClipError(f"another process is writing {out}; wait for it to end") from None
    except OSError as error:
        raise CNClipError(
            f"could not write {out}: {error}; finished parts stay in {parts}. Free some space and "
            "run the same command again"
        ) from error
    return report


def claim_out(
    out: str | Path, *, inputs: Iterable[str | Path] = (), overwrite: bool = False
) -> tuple[Path, Path]:
    """Check that embeddings, and their parts meanwhile, may be written; nothing is touched.

    Returns:
        ``out`` as a path, and the folder of the parts.

    Raises:
        UsageError: see ``features.claim_features``; or ``OUT.parts`` holds anything else.
    """
    inputs = list(inputs)
    path = Path(os.path.normpath(claim_features(out, inputs=inputs, overwrite=overwrite)))
    parts = path.with_name(f"{path.name}.parts")
    claim(
        parts,
        folder_by("embed", _own_parts, _HALF_WRITTEN),
        kind="folder",
        inputs=inputs,
        in_place=True,
        old=_HALF_WRITTEN,
    )
    return path, parts


def _own_parts(folder: Path) -> Collection[str]:
    """Return the names of the files of a folder of parts; none if it has no ``about.json``."""
    if not {"fingerprint", "kind", "dim"} <= json_object_at(folder / _ABOUT).keys():
        return ()
    return {_ABOUT, *(name for name in entries(folder) if _PART.fullmatch(name))}


@dataclass(frozen=True, slots=True)
class _Row:
    """What is remembered of an item once it is embedded."""

    id: str | int
    key: str
    label: str


def _embed_all(
    embedder: Embedder,
    kind: Kind,
    items: Iterable[Item],
    store: _Parts,
    report: Extraction,
    tick: Callable[[int], None],
) -> list[_Row]:
    """Embed what the store does not hold; count it in ``report``, return all items in order."""
    rows: list[_Row] = []
    pending: list[tuple[Item, str]] = []
    begin = time.perf_counter()

    def flush() -> None:
        chunk = [item for item, _ in pending]
        if kind == "images":
            contents = (item.content for item in _ticking(chunk, tick))
            vectors, errors = embedder.embed_readable(contents)
            report.failed += [(chunk[i].id, _reason(chunk[i], e)) for i, e in errors.items()]
        else:
            errors = {}
            vectors = embedder.embed_texts([str(item.content) for item in chunk])
            tick(len(chunk))
        keys = [key for index, (_, key) in enumerate(pending) if index not in errors]
        store.add(keys, vectors)
        report.embedded += len(chunk)
        report.seconds = time.perf_counter() - begin
        pending.clear()

    seen: dict[str | int, str] = {}
    for item in items:
        if item.id in seen:
            raise UsageError(f"{item.where}: the id {item.id!r} was used before, {seen[item.id]}")
        seen[item.id] = item.where
        key = f"{item.id}\t{item.stamp}"
        label = path_text(str(item.id if isinstance(item.content, bytes) else item.content))
        rows.append(_Row(item.id, key, label))
        if store.place(key):
            report.resumed += 1
            tick(1)
            continue
        pending.append((item, key))
        if len(pending) == _PER_PART[kind]:
            flush()
    if pending:
        flush()
    if not rows:
        raise UsageError(f"the inputs hold no {kind}")
    return rows


def _ticking(items: list[Item], tick: Callable[[int], None]) -> Iterator[Item]:
    for item in items:
        yield item
        tick(1)


def _reason(item: Item, error: ImageError) -> str:
    return f"{item.where}: {error}" if isinstance(item.content, bytes) else str(error)


class _Parts:
    """Finished parts in a folder: each a file of keys and rows, written whole."""

    def __init__(self, folder: Path, about: dict[str, Any], *, anew: bool) -> None:
        self._folder = folder
        self._places: dict[str, tuple[int, int]] = {}
        self._dim = int(about["dim"])
        self._read = lru_cache(maxsize=64)(self._load)  # new rows may lie between old ones
        old = folder / _ABOUT
        files = sorted(folder / name for name in _own_parts(folder) if name != _ABOUT)
        if anew:
            for file in files:
                file.unlink()
            files = []
        elif files and json_object_at(old) != about:
            raise UsageError(
                f"{folder} was begun with another model, precision or kind; use the same again, "
                "or --overwrite to begin anew"
            )
        with published(old) as path:
            path.write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
        self._next = 0
        for file in files:
            self._next = int(file.stem) + 1
            try:
                keys, _ = self._part(file)
            except DataError as error:  # its items are embedded again
                warnings.warn(f"{error}; its items are embedded again", stacklevel=2)
                continue
            self._places |= {key: (int(file.stem), row) for row, key in enumerate(keys)}

    def place(self, key: str) -> tuple[int, int] | None:
        return self._places.get(key)

    def add(self, keys: list[str], rows: npt.NDArray[np.float32]) -> None:
        raw = np.frombuffer(json.dumps(keys).encode(), dtype=np.uint8)
        with published(self._file(self._next)) as path, path.open("wb") as stream:
            np.savez(stream, keys=raw, rows=rows)
        self._places |= {key: (self._next, row) for row, key in enumerate(keys)}
        self._next += 1

    def rows(self, places: list[tuple[int, int]]) -> npt.NDArray[np.float32]:
        out = np.empty((len(places), self._dim), dtype=np.float32)
        for index, (part, row) in enumerate(places):
            out[index] = self._read(part)[row]
        return out

    def _load(self, part: int) -> npt.NDArray[np.float32]:
        return self._part(self._file(part))[1]

    def _part(self, file: Path) -> tuple[list[str], npt.NDArray[np.float32]]:
        """Return a part's keys and rows (N, D).

        Raises:
            DataError: the file is damaged.
        """
        stored = read_npz(file, ("keys", "rows"))
        rows = stored["rows"]
        try:
            keys = read_json(stored["keys"].astype(np.uint8).tobytes())
        except ValueError:
            keys = None
        fits = isinstance(keys, list) and rows.shape == (len(keys), self._dim)
        if not fits or rows.dtype != np.float32 or not all(isinstance(key, str) for key in keys):
            raise DataError(f"{file} is damaged")
        return keys, rows

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:06}.npz"

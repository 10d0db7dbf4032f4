"""Embed many images or texts into a file, in parts, so that an interrupted run can resume."""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from cn_clip.arrays import read_npz
from cn_clip.data.process_map import Progress, no_progress
from cn_clip.embedder import Embedder
from cn_clip.embeddings.files import (
    EMBEDDINGS,
    EmbeddingsToWrite,
    claim_embeddings,
    with_format,
    writer_for,
)
from cn_clip.embeddings.inputs import Kind
from cn_clip.embeddings.item import Item
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.format_version import FIELD
from cn_clip.outputs import claim, entries, json_object_at, own_folder, remove
from cn_clip.publish import LOCK, atomic_file, sweep
from cn_clip.text import read_json
from cn_clip.translation import _, translate

_PER_PART = {"images": 128, "texts": 16_384}
_ABOUT = "about.json"
_PART = re.compile(r"\d{6}\.npz")
_HALF_WRITTEN = re.compile(rf"{_PART.pattern}|about\.json")


@dataclass(slots=True)
class Extraction:
    """Counts of an extraction; ``failed`` holds (id, message) of each unreadable image."""

    out: str
    written: int = 0
    embedded: int = 0
    resumed: int = 0
    seconds: float = 0.0
    failed: list[tuple[str | int, str]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Items embedded per second, reading and decoding included."""
        return self.embedded / self.seconds if self.seconds else 0.0


def extract(
    embedder: Embedder,
    kind: Kind,
    items: Iterable[Item],
    out: str | Path,
    *,
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
    on_progress: Progress = no_progress,
) -> Extraction:
    """Embed all items and write unit vectors to ``out``, in the order of the items.

    Finished parts stay in ``OUT.parts`` until ``out`` is written; another run with the same model
    reuses them, and embeds new and changed items only.

    Args:
        embedder: the model.
        kind: of the items.
        items: from ``cn_clip.embeddings.inputs``.
        out: ``.npz``, ``.jsonl``, or a folder in clip-retrieval's layout.
        inputs: files and folders of the items and the model; none of them may be overwritten.
        overwrite: replace ``out``, if this function wrote it, and start over.
        on_progress: called with (done, total) items; ``total`` is None unless ``items`` has a
            length.

    Raises:
        UsageError: ``out`` exists, is an input or of unknown format, an id is repeated, or the
            parts are of another model.
        CNClipError: another process writes to ``out``, or the disk is full; finished parts stay.
    """
    out, parts = claim_out(out, inputs=inputs, overwrite=overwrite)
    write = writer_for(out)
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
            store = _PartStore(parts, about, overwrite=overwrite)
            embedded = _embed_all(embedder, kind, items, store, report, on_progress)
            rows = [(item, row) for item in embedded if (row := store.find(item.key))]
            embeddings = EmbeddingsToWrite(
                kind,
                [item.id for item, _ in rows],
                [item.label for item, _ in rows],
                embedder.dim,
                lambda start, end: store.rows([row for _, row in rows[start:end]]),
                about,
            )
            write(embeddings, out)
            report.written = len(rows)
            remove(parts, _own_part_files(parts))
        (parts / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # not empty: it holds a file of someone else
            parts.rmdir()
    except Timeout:
        raise CNClipError(
            _("another process is writing {out}; wait for it to end", out=out)
        ) from None
    except OSError as error:
        raise CNClipError(
            _(
                "could not write {out}: {error}; finished parts stay in {parts}. Free some space "
                "and run the same command again",
                out=out,
                error=error,
                parts=parts,
            )
        ) from error
    return report


def claim_out(
    out: str | Path, *, inputs: Iterable[str | Path] = (), overwrite: bool = False
) -> tuple[Path, Path]:
    """Check that embeddings and their parts may be written, without touching anything.

    Returns:
        ``out`` as a path, and the folder of the parts.

    Raises:
        UsageError: see ``files.claim_embeddings``; or ``OUT.parts`` holds other files.
    """
    inputs = list(inputs)
    path = Path(os.path.normpath(claim_embeddings(out, inputs=inputs, overwrite=overwrite)))
    parts = path.with_name(f"{path.name}.parts")
    claim(
        parts,
        own_folder("embed", _own_part_files, _HALF_WRITTEN),
        kind="folder",
        inputs=inputs,
        in_place=True,
        old=_HALF_WRITTEN,
    )
    return path, parts


def _own_part_files(folder: Path) -> Collection[str]:
    """Return the names of our files in a folder of parts; none if it has no ``about.json``."""
    if not {"fingerprint", "kind", "dim"} <= json_object_at(folder / _ABOUT).keys():
        return ()
    return {_ABOUT, *(name for name in entries(folder) if _PART.fullmatch(name))}


@dataclass(frozen=True, slots=True)
class _Item:
    """An item without its content."""

    id: str | int
    key: str
    label: str


def _embed_all(
    embedder: Embedder,
    kind: Kind,
    items: Iterable[Item],
    store: _PartStore,
    report: Extraction,
    on_progress: Progress,
) -> list[_Item]:
    """Embed the items that the store lacks, count them in ``report``, return all items in order."""
    rows: list[_Item] = []
    pending: list[tuple[Item, str]] = []
    start = time.perf_counter()
    total = len(items) if isinstance(items, Sized) else None
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    def flush() -> None:
        chunk = [item for item, _ in pending]
        if kind == "images":
            contents = (item.content for item in _counted(chunk, advance))
            vectors, errors = embedder.embed_readable(contents)
            report.failed += [(chunk[i].id, chunk[i].reason(e)) for i, e in errors.items()]
        else:
            errors = {}
            vectors = embedder.embed_texts([str(item.content) for item in chunk])
            advance(len(chunk))
        keys = [key for index, (_, key) in enumerate(pending) if index not in errors]
        store.add(keys, vectors)
        report.embedded += len(chunk)
        report.seconds = time.perf_counter() - start
        pending.clear()

    seen: dict[str | int, str] = {}
    for item in items:
        if item.id in seen:
            raise UsageError(
                _(
                    "{where}: the id {id!r} was used before, in {earlier}",
                    where=item.where,
                    id=item.id,
                    earlier=seen[item.id],
                )
            )
        seen[item.id] = item.where
        key = f"{item.id}\t{item.stamp}"
        rows.append(_Item(item.id, key, item.label))
        if store.find(key):
            report.resumed += 1
            advance(1)
            continue
        pending.append((item, key))
        if len(pending) == _PER_PART[kind]:
            flush()
    if pending:
        flush()
    if not rows:
        raise UsageError(_("the inputs hold no {kind}", kind=translate(kind)))
    return rows


def _counted(items: list[Item], advance: Callable[[int], None]) -> Iterator[Item]:
    for item in items:
        yield item
        advance(1)


class _PartStore:
    """Finished parts in a folder: files of keys and rows (N, dim)."""

    def __init__(self, folder: Path, about: dict[str, Any], *, overwrite: bool) -> None:
        self._folder = folder
        self._rows: dict[str, tuple[int, int]] = {}
        self._dim = int(about["dim"])
        self._load_cached = lru_cache(maxsize=64)(self._load)  # the order of items may mix parts
        about = with_format(about)
        about_file = folder / _ABOUT
        files = sorted(folder / name for name in _own_part_files(folder) if name != _ABOUT)
        if overwrite:
            for file in files:
                file.unlink()
            files = []
        elif files:
            stored = json_object_at(about_file)
            EMBEDDINGS.check(
                stored.get(FIELD), folder, UsageError, _("start over with --overwrite")
            )
            if with_format(stored) != about:
                raise UsageError(
                    _(
                        "{folder} was started with another model, precision or kind; use the same "
                        "one, or --overwrite to start over",
                        folder=folder,
                    )
                )
        with atomic_file(about_file) as path:
            path.write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
        self._next = 0
        for file in files:
            self._next = int(file.stem) + 1
            try:
                keys, _unused = self._part(file)
            except DataError as error:
                warnings.warn(_("{error}; its items are embedded again", error=error), stacklevel=2)
                continue
            self._rows |= {key: (int(file.stem), row) for row, key in enumerate(keys)}

    def find(self, key: str) -> tuple[int, int] | None:
        """Return the part and the row of a key."""
        return self._rows.get(key)

    def add(self, keys: list[str], rows: npt.NDArray[np.float32]) -> None:
        raw = np.frombuffer(json.dumps(keys).encode(), dtype=np.uint8)
        with atomic_file(self._file(self._next)) as path, path.open("wb") as stream:
            np.savez(stream, keys=raw, rows=rows)
        self._rows |= {key: (self._next, row) for row, key in enumerate(keys)}
        self._next += 1

    def rows(self, rows: list[tuple[int, int]]) -> npt.NDArray[np.float32]:
        out = np.empty((len(rows), self._dim), dtype=np.float32)
        for index, (part, row) in enumerate(rows):
            out[index] = self._load_cached(part)[row]
        return out

    def _load(self, part: int) -> npt.NDArray[np.float32]:
        return self._part(self._file(part))[1]

    def _part(self, file: Path) -> tuple[list[str], npt.NDArray[np.float32]]:
        """Read the keys and rows (N, dim) of a part.

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
            raise DataError(_("{file} is damaged", file=file))
        return keys, rows

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:06}.npz"

"""One shard, from its inputs to its manifest: the function that every engine calls.

Two processes that compute the same shard cannot mix their files: in a folder one waits outside
(``working``), in a bucket the files of one count (``complete``). A second computation gives the
same ids in the same order; the vectors may differ in rounding if the machines do.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip import __version__
from cn_clip.bulk.inputs import Content, Input, Unreadable, inputs_of
from cn_clip.bulk.manifest import (
    Manifest,
    Written,
    data_names,
    manifest_name,
    parse_manifest,
    quarantine_name,
)
from cn_clip.bulk.plan import (
    Plan,
    Planned,
    Shard,
    check_version,
    existing_plans,
    plan_of,
    shard_count,
)
from cn_clip.bulk.store import open_store
from cn_clip.bulk.store.base import Store
from cn_clip.data.sources.parquet import import_pyarrow
from cn_clip.embedder import Embedder, load
from cn_clip.errors import CNClipError, DataError, UnavailableError, UsageError
from cn_clip.translation import _

NOTES = ".work/notes"  # of shards that are running or have failed
_COMPUTING = ("numpy", "torch", "onnxruntime", "openvino", "pillow")


@dataclass(slots=True)
class _Rows:
    """The inputs of a shard as they are read.

    Attributes:
        kept: inputs that can be embedded so far.
        quarantine: position -> what is wrong.
        missing: how many images could not be read at all.
    """

    kept: dict[int, Input] = field(default_factory=dict)
    quarantine: dict[int, dict[str, str]] = field(default_factory=dict)
    missing: int = 0

    def put_aside(self, position: int, id: str, where: str, reason: str) -> None:
        """List an input in the quarantine."""
        self.kept.pop(position, None)
        self.quarantine[position] = {"id": id, "where": where, "reason": reason}


@lru_cache(maxsize=1)
def planned_shards(place: str) -> tuple[Store, tuple[Plan, ...]]:
    """Return an output and its plans, which a process reads once."""
    store = open_store(place)
    return store, tuple(existing_plans(store))


def run_shard(
    place: str, number: int, *, accept_missing: bool = False, device: str | None = None
) -> Manifest:
    """Compute a shard, unless it is done; return its manifest.

    The model is loaded once per process.

    Args:
        place: the output: a folder, or a URL.
        number: of the shard.
        accept_missing: finish a shard of which no input can be read.
        device: instead of the planned one, such as ``cuda:1`` for ``cuda``.

    Raises:
        UsageError: this machine has another version of the package or another model than planned,
            or there is no such shard.
        DataError: an input file is missing or has changed, or no input can be read.
        BusyError: another process computes the shard.
        OSError: the output is full.
    """
    store, plan = _plan_of(place, number)
    check_version(plan, store.name)
    done = _manifest(store, number)
    if done is not None:
        return done
    embedder = _embedder(plan, device)
    with store.working(f"{number:05}") as folder:
        done = _manifest(store, number)  # again, as another process may have finished it
        if done is not None:
            return done
        note = f"{NOTES}/{number:05}.json"
        attempt = _attempts(store, note) + 1
        store.note(note, _note(attempt, None))
        try:
            manifest = _compute(Planned(store, plan), number, embedder, folder, attempt,
                                accept_missing)  # fmt: skip
        except (CNClipError, OSError) as error:
            store.note(note, _note(attempt, str(error)))
            raise
        except KeyboardInterrupt:
            store.remove(note)
            raise
        except Exception as error:
            store.note(note, _note(attempt, f"{type(error).__name__}: {error}"))
            raise
        store.remove(note)
    return manifest


def _plan_of(place: str, number: int) -> tuple[Store, Plan]:
    store, plans = planned_shards(place)
    if number >= shard_count(plans):  # a plan may have been added since
        planned_shards.cache_clear()
        store, plans = planned_shards(place)
    return store, plan_of(plans, number)


def _manifest(store: Store, number: int) -> Manifest | None:
    content = store.completed(manifest_name(number))
    if content is None:
        return None
    return parse_manifest(content, f"{store.name}/{manifest_name(number)}")


@lru_cache(maxsize=1)
def _embedder(plan: Plan, device: str | None) -> Embedder:
    """Load the model of a plan.

    Raises:
        UsageError: it is another one than planned.
    """
    model = plan.model
    embedder = load(
        model.model,
        backend=model.backend,
        device=device or model.device,
        precision=model.precision,
        fast_decode=model.fast_decode,
        download_root=model.download_root,
    )
    if embedder.fingerprint != model.fingerprint:
        raise UsageError(
            _(
                "the model {model} is not the planned one here: its fingerprint is {found}, "
                "planned {planned}; give this machine the same weights, precision and runtime, or "
                "make a plan in another place",
                model=model.model,
                found=embedder.fingerprint,
                planned=model.fingerprint,
            )
        )
    return embedder


def _compute(
    planned: Planned,
    number: int,
    embedder: Embedder,
    folder: Path,
    attempt: int,
    accept_missing: bool,
) -> Manifest:
    """Embed the inputs of a shard and publish its files, the manifest last."""
    start = time.perf_counter()
    store, plan = planned.store, planned.plan
    shard = planned.shard(number)
    rows = _Rows()
    vectors = _embed(planned, shard, embedder, rows)
    if rows.missing == shard.count and not accept_missing:
        first = next(iter(rows.quarantine.values()))
        raise DataError(
            _(
                "none of the {count:,} inputs of shard {number} can be read; are they at the same "
                "paths on this machine? If they are gone: --accept-missing. The first: {reason}",
                count=shard.count,
                number=number,
                reason=first["reason"],
            )
        )
    if len(rows.kept) + len(rows.quarantine) != shard.count:
        raise DataError(
            _(
                "shard {number} has {count:,} inputs, and {found:,} were read; the input files "
                "are damaged, or have changed",
                number=number,
                count=shard.count,
                found=len(rows.kept) + len(rows.quarantine),
            )
        )
    files = _write(folder, shard, plan, vectors, rows)
    manifest = Manifest(
        shard=number,
        plan=plan.digest,
        key=f"{shard.key:016x}",
        rows_in=shard.count,
        rows_out=len(rows.kept),
        quarantined=len(rows.quarantine),
        files=files,
        seconds=round(time.perf_counter() - start, 3),
        attempt=attempt,
        host=socket.gethostname(),
        model=plan.model.fingerprint,
        versions=_versions(),
    )
    name = manifest_name(number)
    # An earlier attempt may have left a quarantine.
    published: dict[str, Path | None] = {quarantine_name(number): None}
    published |= {each: _file(folder, each) for each in files}
    content = store.complete(name, manifest.to_json(), published)
    return parse_manifest(content, f"{store.name}/{name}")


def _embed(
    planned: Planned, shard: Shard, embedder: Embedder, rows: _Rows
) -> dict[str, npt.NDArray[Any]]:
    """Return the vectors of the inputs that have all they need, by the stem of their file."""
    plan = planned.plan
    inputs = inputs_of(planned.lines(shard), shard.skip, shard.count, plan.embed)
    for position, each in enumerate(inputs):
        if isinstance(each, Unreadable):
            rows.put_aside(position, "", each.where, each.reason)
        elif plan.embed != "images" and not each.text.strip():
            rows.put_aside(position, each.id, each.label, _("its text is empty"))
        else:
            rows.kept[position] = each
    parts: dict[str, dict[int, npt.NDArray[np.float32]]] = {}
    if plan.embed != "texts":
        parts["img_emb"] = _embed_images(embedder, rows)
    if plan.embed != "images":
        texts = embedder.embed_texts([each.text for each in rows.kept.values()])
        parts["text_emb"] = dict(zip(rows.kept, texts, strict=True))
    for position, each in list(rows.kept.items()):
        if not all(np.isfinite(part[position]).all() for part in parts.values()):
            rows.put_aside(position, each.id, each.label, _("its embedding holds NaN or infinity"))
    stored = np.dtype(plan.stored)
    empty = np.empty((0, embedder.dim), np.float32)
    return {
        stem: np.concatenate([empty, *(part[n][None] for n in rows.kept)]).astype(stored)
        for stem, part in parts.items()
    }


def _embed_images(embedder: Embedder, rows: _Rows) -> dict[int, npt.NDArray[np.float32]]:
    """Embed each image once; return the vectors by position. Unreadable ones are put aside."""
    firsts: dict[str, int] = {}  # image -> position of its first input
    read: list[int] = []
    failed: dict[int, str] = {}

    def contents() -> Iterator[Content]:
        for position, each in rows.kept.items():
            if firsts.setdefault(each.image, position) != position:
                continue
            try:
                content = each.read()
            except UnavailableError:
                raise
            except DataError as error:
                failed[position] = str(error)
                continue
            read.append(position)
            yield content

    vectors, errors = embedder.embed_readable(contents())
    rows.missing = sum(1 for each in rows.kept.values() if firsts[each.image] in failed)
    for index, error in errors.items():
        failed[read[index]] = str(error)
    good = (position for index, position in enumerate(read) if index not in errors)
    by_first = dict(zip(good, vectors, strict=True))
    for position, each in list(rows.kept.items()):
        first = firsts[each.image]
        if first in failed:
            rows.put_aside(position, each.id, each.label, failed[first])
        else:
            by_first[position] = by_first[first]
    return by_first


def _write(
    folder: Path, shard: Shard, plan: Plan, vectors: dict[str, npt.NDArray[Any]], rows: _Rows
) -> dict[str, Written]:
    """Write the files of a shard into a folder; return what each is, by its final name."""
    *arrays, metadata = data_names(shard.number, plan.embed)
    for name in arrays:
        with _file(folder, name).open("wb") as stream:
            np.save(stream, vectors[os.path.dirname(name)])
    kept = rows.kept.values()
    _write_metadata(
        _file(folder, metadata),
        {
            "id": [each.id for each in kept],
            "image_path": [each.label for each in kept],
            "caption": [each.text for each in kept],
            "image_id": [each.own_id for each in kept],
        },
    )
    names = [*arrays, metadata]
    if rows.quarantine:
        names.append(quarantine_name(shard.number))
        lines = (
            json.dumps({"input": position, **values}, ensure_ascii=False) + "\n"
            for position, values in sorted(rows.quarantine.items())
        )
        _file(folder, names[-1]).write_text("".join(lines), encoding="utf-8")
    return {name: _written(_file(folder, name)) for name in names}


def _file(folder: Path, name: str) -> Path:
    return folder / os.path.basename(name)


def _written(path: Path) -> Written:
    with path.open("rb") as stream:
        return Written(hashlib.file_digest(stream, "sha256").hexdigest(), path.stat().st_size)


def _write_metadata(path: Path, columns: dict[str, list[str]]) -> None:
    arrow, parquet = import_pyarrow("pyarrow"), import_pyarrow("pyarrow.parquet")
    types = {name: arrow.array(values, arrow.string()) for name, values in columns.items()}
    parquet.write_table(arrow.table(types), path)


def note_failure(store: Store, number: int, error: str) -> None:
    """Note why a shard failed, for ``status``, if its worker died and could not."""
    note = f"{NOTES}/{number:05}.json"
    values = _read_note(store, note)
    if values and values.get("error") is None:
        store.note(note, json.dumps(values | {"error": error}, ensure_ascii=False).encode())


def _attempts(store: Store, note: str) -> int:
    attempts = _read_note(store, note).get("attempt")
    return attempts if isinstance(attempts, int) else 0


def _read_note(store: Store, note: str) -> dict[str, Any]:
    try:
        values = json.loads(store.read(note) or b"{}")
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _note(attempt: int, error: str | None) -> bytes:
    values = {"attempt": attempt, "host": socket.gethostname(), "pid": os.getpid(), "error": error}
    return json.dumps(values, ensure_ascii=False).encode()


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    found = {"cn_clip": __version__, "python": platform.python_version()}
    for name in _COMPUTING:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

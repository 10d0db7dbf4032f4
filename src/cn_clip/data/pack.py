"""Pack a source as tar shards, or as the official TSV or LMDB: each image once, with all its texts.

Worker processes write shards atomically; an interrupted run resumes after the last finished shard.
``manifest.json`` is written last: a folder that has it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from cn_clip.data.captions import digest as digest_of
from cn_clip.data.curate.grouping import RowGroups, first_equal, group_rows
from cn_clip.data.encode import UNCHANGED, Encoding, encode_image
from cn_clip.data.process_map import Progress, Workers, chunked, no_progress, parallel_map
from cn_clip.data.shard import write_shard
from cn_clip.data.sources.base import Source, located
from cn_clip.data.sources.lmdb import write_lmdb
from cn_clip.data.sources.official import write_tsv
from cn_clip.data.sources.open import id_digest
from cn_clip.data.sources.tar import Sample
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.outputs import (
    atomic_folder,
    claim,
    entries,
    json_object_at,
    own_folder,
    remove,
    stamped_files,
)
from cn_clip.publish import LOCK, atomic_file, sweep
from cn_clip.translation import _

Target = Literal["tar", "tsv", "lmdb"]
_MANIFEST, _PLAN = "manifest.json", ".plan.json"
_SHARD_NAME = re.compile(r"\d{5,}\.tar")
_HALF_WRITTEN = re.compile(r"\d{5,}\.(tar|json)|manifest\.json|\.plan\.json")
_ROWS = 4096  # read by a worker at once
_LMDB_LOCKS = ("imgs/lock.mdb", "pairs/lock.mdb")  # written by readers of an LMDB


@dataclass(slots=True)
class PackResult:
    """Counts of what was written; ``skipped`` has a message for each skipped pair, ``left_out``
    is the number of pairs that ``without`` names."""

    out: str
    left_out: int = 0
    shards: int = 0
    images: int = 0
    pairs: int = 0
    bytes: int = 0
    skipped: list[str] = field(default_factory=list)


def pack(
    source: Source,
    out: str | os.PathLike[str],
    *,
    to: Target = "tar",
    encoding: Encoding = UNCHANGED,
    without: npt.NDArray[np.int64] | None = None,
    images_per_shard: int = 5000,
    split: str = "train",
    workers: Workers = 0,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
    on_progress: Progress = no_progress,
) -> PackResult:
    """Write a source's pairs to the folder ``out``.

    Args:
        source: from ``open_source``.
        out: the folder of ``00000.tar``, ... and ``manifest.json``; or of ``SPLIT_imgs.tsv`` and
            ``SPLIT_texts.jsonl``; or of the LMDBs ``imgs`` and ``pairs``.
        to: the format.
        encoding: of the images.
        without: (K,) indexes of pairs to leave out, from ``read_removed``.
        images_per_shard: images per tar.
        split: the name in the files of a TSV.
        workers: worker processes, or workers of a cluster; 0 runs in this process.
        inputs: files and folders of the source; none of them may be overwritten.
        overwrite: replace what this function wrote to ``out``.
        on_progress: called with (done, total) images.

    Raises:
        UsageError: ``out`` exists, is an input or holds other files, or was started from other
            data or with other options.
        DataError: no pair is usable, or a worker died.
        CNClipError: another process writes to ``out``, or the disk is full; finished tar shards
            stay, a TSV and an LMDB start anew.
    """
    if images_per_shard < 1:
        raise UsageError(
            _(
                "{images_per_shard} images per shard; give 1 or more",
                images_per_shard=images_per_shard,
            )
        )
    if not split or re.search(r"[/\\\0]", split):  # the files would be outside of ``out``
        raise UsageError(
            _("the split {split!r} is not a file name; give one such as train", split=split)
        )
    out = claim_pack(out, to=to, inputs=inputs, overwrite=overwrite)
    result = PackResult(str(out), 0 if without is None else len(np.unique(without)))
    groups, digest = _group_images(
        source, without, result.skipped, official=to != "tar", workers=workers
    )
    if not len(groups):
        raise DataError(
            _(
                "{name} has no usable pair; the first: {first_skipped}",
                name=source.name,
                first_skipped=_first_skipped(result),
            )
        )
    job = _Job(_Packer(source, encoding), groups, out, result, workers, on_progress)
    try:
        if to == "tar":
            plan = {"source": source.name, "digest": digest, "per_shard": images_per_shard}
            plan |= {"shards": -(-len(groups) // images_per_shard)}
            plan |= asdict(encoding)
            _pack_tars(job, plan, overwrite=overwrite)
        else:
            _pack_official(job, to, split)
    except Timeout:
        raise CNClipError(
            _("another process is writing {out}; wait for it to end", out=out)
        ) from None
    except OSError as error:
        kept = _("finished shards stay") if to == "tar" else _("nothing of it stays")
        raise CNClipError(
            _(
                "could not write {out}: {error}; {kept}. Free some space and run the same command "
                "again",
                out=out,
                error=error,
                kept=kept,
            )
        ) from error
    return result


def claim_pack(
    out: str | os.PathLike[str],
    *,
    to: Target = "tar",
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> Path:
    """Check that pairs may be packed into a folder, without touching it. Return it as a path.

    An unfinished folder of shards may be resumed.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    resumes = to == "tar" and not overwrite and bool(json_object_at(Path(out) / _PLAN))
    return claim(
        out,
        _CHECK_OWN,
        kind="folder",
        inputs=inputs,
        overwrite=None if resumes else overwrite,
        in_place=to == "tar",
        old=_HALF_WRITTEN,
    )


def _own_files(folder: Path) -> Collection[str]:
    """Return the names of our files in a folder, by its plan, its manifest, or its stamp (TSV,
    LMDB)."""
    names = set(stamped_files(folder, "pack"))
    plan, manifest = (json_object_at(folder / name) for name in (_PLAN, _MANIFEST))
    shards = plan.get("shards")
    if {"source", "digest", "per_shard"} <= plan.keys() and isinstance(shards, int):
        stems = {
            path.stem for path in folder.iterdir() if _SHARD_NAME.fullmatch(f"{path.stem}.tar")
        }
        planned = [s for s in stems if int(s) < shards and _shard_name(int(s)) == f"{s}.tar"]
        names |= {_PLAN, _MANIFEST}
        names |= {f"{stem}{suffix}" for stem in planned for suffix in (".tar", ".json")}
    listed = manifest.get("shards")
    if {"source", "images", "pairs", "bytes"} <= manifest.keys() and isinstance(listed, list):
        shards = (shard.get("name") for shard in listed if isinstance(shard, dict))
        names |= {_MANIFEST, *(name for name in map(str, shards) if _SHARD_NAME.fullmatch(name))}
    return names


def _shard_name(number: int) -> str:
    return f"{number:05}.tar"


_CHECK_OWN = own_folder("pack", _own_files, _HALF_WRITTEN)


def _group_images(
    source: Source,
    without: npt.NDArray[np.int64] | None,
    skipped: list[str],
    *,
    official: bool,
    workers: Workers,
) -> tuple[RowGroups, str]:
    """Group the usable pairs by image, and return a digest of all ids and texts.

    In the official formats, image ids are unique, and an image may have no text.
    """
    images, ids = (np.zeros(len(source), dtype=np.uint64) for _ in range(2))
    usable = np.ones(len(source), dtype=bool)
    digest = hashlib.blake2b(digest_size=16)
    if without is not None:
        usable[without] = False
    jobs = chunked(np.flatnonzero(usable), _ROWS)
    with parallel_map(_ReadRows(source, official), workers if len(jobs) > 2 else 0) as run:
        for indexes, read in zip(jobs, run(jobs), strict=True):
            for index, row in zip(indexes.tolist(), read, strict=True):
                if isinstance(row, str):
                    usable[index] = False
                    skipped.append(row)
                else:
                    images[index], ids[index], content = row
                    digest.update(content)
    rows = np.flatnonzero(usable)
    groups = group_rows(rows, images[rows])
    if official:
        firsts = groups.firsts
        before = first_equal(ids[firsts])
        for repeated in np.flatnonzero(before != np.arange(len(firsts)))[:1].tolist():
            first, second = int(firsts[before[repeated]]), int(firsts[repeated])
            raise DataError(
                _(
                    "the image id {image_id!r} names one image in {first} and another in "
                    "{second}; pack each file separately, or to tar",
                    image_id=source.row(second).image_id,
                    first=source.where(first),
                    second=source.where(second),
                )
            )
    return groups, digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _ReadRows:
    """Reads rows, in a worker: for each (image key, digest of the image id, all of it in JSON), or
    why it is not usable."""

    source: Source
    without_texts: bool

    def __call__(self, indexes: npt.NDArray[np.int64]) -> list[tuple[int, int, bytes] | str]:
        return [self._read(index) for index in indexes.tolist()]

    def _read(self, index: int) -> tuple[int, int, bytes] | str:
        try:
            row = self.source.row(index)
        except DataError as error:
            return str(error)
        # An image of a test set that has no text.
        alone = self.without_texts and not row.text and not row.text_id
        if not row.text.strip() and not alone:
            return _("{where}: its text is empty", where=self.source.where(index))
        content = json.dumps([row.image_id, row.text_id, row.text]).encode()
        return id_digest(self.source, index, row.image_id), digest_of(row.image_id), content


@dataclass(frozen=True, slots=True)
class _Packer:
    """Reads and encodes samples, in a worker."""

    source: Source
    encoding: Encoding

    def sample(self, group: npt.NDArray[np.int64]) -> Sample | str:
        """Return an image with its texts, or a message if it cannot be encoded."""
        rows = [self.source.row(index) for index in group.tolist()]
        first = int(group[0])
        try:
            image, suffix = encode_image(self.source.image(first), self.encoding)
        except CNClipError as error:
            more = (
                _(" (and {count} more texts of this image)", count=len(rows) - 1)
                if len(rows) > 1
                else ""
            )
            return located(self.source, first, error) + more
        texts = [(row.text_id, row.text) for row in rows if row.text]
        return Sample(image, suffix, rows[0].image_id, texts)

    def shard(self, job: tuple[Path, RowGroups]) -> dict[str, Any]:
        """Write a shard, then its record: name, size, checksum and counts."""
        path, groups = job
        skipped: list[str] = []
        counts = {"images": 0, "pairs": 0}

        def samples() -> Iterator[Sample]:
            for group in groups:
                sample = self.sample(group)
                if isinstance(sample, str):
                    skipped.append(sample)
                    continue
                counts["images"] += 1
                counts["pairs"] += len(sample.texts)
                yield sample

        with atomic_file(path) as temporary:
            write_shard(temporary, samples())
            with temporary.open("rb") as stream:
                checksum = hashlib.file_digest(stream, "sha256").hexdigest()
        record = {"name": path.name, "bytes": path.stat().st_size, "sha256": checksum}
        record |= {**counts, "skipped": skipped}
        _write_json(path.with_suffix(".json"), record)
        return record


@dataclass(frozen=True, slots=True)
class _Job:
    """Image groups to pack into ``out``, and the result to count them in."""

    packer: _Packer
    groups: RowGroups
    out: Path
    result: PackResult
    workers: Workers
    on_progress: Progress


def _pack_tars(job: _Job, plan: dict[str, Any], *, overwrite: bool) -> None:
    groups, out, result = job.groups, job.out, job.result
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / LOCK, timeout=0):
        _start_or_resume(out, plan, overwrite)
        chunks = chunked(groups, plan["per_shard"])
        paths = [out / _shard_name(number) for number in range(len(chunks))]
        records = _finished_shards(out, paths)
        missing = [pair for pair in zip(paths, chunks, strict=True) if pair[0] not in records]
        done = len(groups) - sum(len(chunk) for _, chunk in missing)
        job.on_progress(done, len(groups))
        with parallel_map(job.packer.shard, job.workers) as run:
            for (path, chunk), record in zip(missing, run(missing), strict=True):
                records[path] = record
                done += len(chunk)
                job.on_progress(done, len(groups))
        shards = [records[path] for path in paths]
        result.shards = len(shards)
        for shard in shards:
            result.images += shard["images"]
            result.pairs += shard["pairs"]
            result.bytes += shard["bytes"]
            result.skipped += shard["skipped"]
        summary = {"source": plan["source"], "images": result.images, "pairs": result.pairs}
        summary |= {"bytes": result.bytes, "skipped": result.skipped, "shards": shards}
        _write_json(out / _MANIFEST, summary)
        remove(out, [*(path.with_suffix(".json").name for path in paths), _PLAN])  # plan last
    (out / LOCK).unlink(missing_ok=True)


def _finished_shards(out: Path, paths: list[Path]) -> dict[Path, dict[str, Any]]:
    """Return the records of the finished shards, from their own file or from the manifest."""
    listed = json_object_at(out / _MANIFEST).get("shards")
    records = [value for value in listed if _is_record(value)] if isinstance(listed, list) else []
    in_manifest = {record["name"]: record for record in records}
    finished = {}
    for path in paths:
        own = json_object_at(path.with_suffix(".json"))
        record = own if _is_record(own) else in_manifest.get(path.name)
        if record is not None and path.is_file():
            finished[path] = record
    return finished


def _is_record(value: object) -> bool:
    """Return whether a value is a valid record of a finished shard."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return False
    skipped = value.get("skipped")
    return (
        all(type(value.get(key)) is int for key in ("images", "pairs", "bytes"))
        and isinstance(skipped, list)
        and all(isinstance(message, str) for message in skipped)
    )


def _start_or_resume(out: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Resume a folder of the same plan, or start in an empty one."""
    sweep(out, _HALF_WRITTEN)
    existing = set(entries(out))
    old_plan = json_object_at(out / _PLAN)
    if old_plan != plan:
        if existing and not overwrite:
            reason = _("was started from other data or options") if old_plan else _("is not empty")
            raise UsageError(
                _(
                    "{out} {reason}; give another place, or --overwrite to start over",
                    out=out,
                    reason=reason,
                )
            )
        foreign = _CHECK_OWN(out)  # again: the claim was made before taking the lock
        if foreign is not None:
            raise UsageError(_("{out} {foreign}; give another place", out=out, foreign=foreign))
        remove(out, existing)
        _write_json(out / _PLAN, plan)


def _pack_official(job: _Job, to: Target, split: str) -> None:
    groups, result = job.groups, job.result

    def samples(results: Iterator[Sample | str]) -> Iterator[Sample]:
        for number, sample in enumerate(results, 1):
            if isinstance(sample, str):
                result.skipped.append(sample)
            else:
                result.images += 1
                result.pairs += len(sample.texts)
                yield sample
            job.on_progress(number, len(groups))

    write = partial(write_tsv, split=split) if to == "tsv" else write_lmdb
    with (
        atomic_folder(job.out, "pack", check=_CHECK_OWN, also=_LMDB_LOCKS) as folder,
        parallel_map(job.packer.sample, job.workers) as run,
    ):
        write(folder, samples(run(groups)))
        result.shards = 1
        result.bytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _first_skipped(result: PackResult) -> str:
    return result.skipped[0] if result.skipped else _("all are left out")


def _write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as temporary:
        text = json.dumps(value, ensure_ascii=False, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")

"""Any source to tar shards, or to the official TSV and LMDB: each picture once, with all its texts.

Shards are written whole, by several processes, and a run that was stopped goes on after the last
finished one. ``manifest.json`` is written last: a folder that has it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from cn_clip.data.captions import digest as digest_of
from cn_clip.data.curate.grouping import Groups, first_equal, grouped
from cn_clip.data.encode import AS_THEY_ARE, Encoding, encoded
from cn_clip.data.process_map import chunked, mapped
from cn_clip.data.sources.base import Row, Source, located
from cn_clip.data.sources.lmdb import write_lmdb
from cn_clip.data.sources.official import write_tsv
from cn_clip.data.sources.open import id_digest
from cn_clip.data.sources.tar import Sample, write_shard
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.publish import (
    LOCK,
    claim,
    entries,
    folder_by,
    json_object_at,
    published,
    published_folder,
    remove,
    stamped,
    sweep,
)

Target = Literal["tar", "tsv", "lmdb"]
_MANIFEST, _PLAN = "manifest.json", ".plan.json"
_NAME = re.compile(r"\d{5,}\.tar")
_HALF_WRITTEN = re.compile(r"\d{5,}\.(tar|json)|manifest\.json|\.plan\.json")
_OF_READERS = ("imgs/lock.mdb", "pairs/lock.mdb")  # an LMDB gets them when it is read


@dataclass(slots=True)
class Packed:
    """What was written; ``skipped`` says of each pair left out why."""

    out: str
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
    encoding: Encoding = AS_THEY_ARE,
    without: npt.NDArray[np.int64] | None = None,
    images_per_shard: int = 5000,
    split: str = "train",
    workers: int = 0,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Packed:
    """Write a source's pairs to the folder ``out``.

    Args:
        source: from ``open_source``.
        out: gets ``00000.tar``, ... and ``manifest.json``; or ``SPLIT_imgs.tsv`` and
            ``SPLIT_texts.jsonl``; or ``imgs`` and ``pairs`` of an LMDB.
        to: which of these.
        encoding: of the pictures.
        without: indexes of pairs to leave out, as ``data decontaminate`` finds them.
        images_per_shard: pictures in a tar.
        split: the name in the files of a TSV.
        workers: processes beside this one; 0 does it here.
        inputs: files and folders of the source, none of which is touched.
        overwrite: replace what this function wrote to ``out``.
        tick: called with the pictures done and the pictures in all.

    Raises:
        UsageError: ``out`` exists, is an input or holds other files, or was begun from other data
            or with other options.
        DataError: no pair can be used, or a worker died.
        CNClipError: another process is at it, or the disk is full; finished shards stay.
    """
    if images_per_shard < 1:
        raise UsageError(f"{images_per_shard} images per shard are none; give 1 or more")
    if not split or re.search(r"[/\\\0]", split):  # its files would lie elsewhere
        raise UsageError(f"the split {split!r} is no name of a file; give one such as train")
    out = claim_pack(out, to=to, inputs=inputs, overwrite=overwrite)
    report = Packed(str(out))
    groups, digest = _grouped(source, without, report, unique_ids=to != "tar")
    if not len(groups):
        raise DataError(
            f"{source.name} holds no pair that can be used; the first: {_first(report)}"
        )
    work = _Work(source, encoding)
    try:
        if to == "tar":
            plan = {"source": source.name, "digest": digest, "per_shard": images_per_shard}
            plan |= {"shards": -(-len(groups) // images_per_shard)}
            plan |= asdict(encoding)
            _pack_tars(work, groups, out, plan, report, workers, overwrite, tick)
        else:
            _pack_official(work, groups, out, to, split, report, workers, tick)
    except Timeout:
        raise CNClipError(f"another process is writing {out}; wait for it to end") from None
    except OSError as error:
        raise CNClipError(
            f"could not write {out}: {error}; finished shards stay. Free some space and run the "
            "same command again"
        ) from error
    return report


def claim_pack(
    out: str | os.PathLike[str],
    *,
    to: Target = "tar",
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> Path:
    """Check that pairs may be packed into a folder; nothing is touched. Return it as a path.

    A folder of shards that was begun and not finished may be gone on with.

    Raises:
        UsageError: see ``publish.claim``.
    """
    goes_on = to == "tar" and not overwrite and bool(json_object_at(Path(out) / _PLAN))
    return claim(
        out,
        _OBJECTION,
        kind="folder",
        inputs=inputs,
        overwrite=None if goes_on else overwrite,
        in_place=to == "tar",
        old=_HALF_WRITTEN,
    )


def _own_files(folder: Path) -> Collection[str]:
    """Return the names that the plan or the manifest of a folder gives to files of ours, or the
    stamp of an official TSV or LMDB."""
    names = set(stamped(folder, "pack"))
    plan, manifest = (json_object_at(folder / name) for name in (_PLAN, _MANIFEST))
    shards = plan.get("shards")
    if {"source", "digest", "per_shard"} <= plan.keys() and isinstance(shards, int):
        stems = {path.stem for path in folder.iterdir() if _NAME.fullmatch(f"{path.stem}.tar")}
        planned = [s for s in stems if int(s) < shards and _name(int(s)) == f"{s}.tar"]
        names |= {_PLAN, _MANIFEST}
        names |= {f"{stem}{suffix}" for stem in planned for suffix in (".tar", ".json")}
    listed = manifest.get("shards")
    if {"source", "images", "pairs", "bytes"} <= manifest.keys() and isinstance(listed, list):
        shown = (each.get("name") for each in listed if isinstance(each, dict))
        names |= {_MANIFEST, *(each for each in map(str, shown) if _NAME.fullmatch(each))}
    return names


def _name(number: int) -> str:
    return f"{number:05}.tar"


_OBJECTION = folder_by("pack", _own_files, _HALF_WRITTEN)


def _grouped(
    source: Source, without: npt.NDArray[np.int64] | None, report: Packed, *, unique_ids: bool
) -> tuple[Groups, str]:
    """Return the pairs of each picture, and a digest of all ids and texts."""
    pictures, ids = (np.zeros(len(source), dtype=np.uint64) for _ in range(2))
    usable = np.ones(len(source), dtype=bool)
    digest = hashlib.blake2b(digest_size=16)
    if without is not None:
        usable[without] = False
    for index in np.flatnonzero(usable).tolist():
        try:
            row = _usable(source, index)
        except DataError as error:
            usable[index] = False
            report.skipped.append(str(error))
            continue
        pictures[index] = id_digest(source, index, row.image_id)
        ids[index] = digest_of(row.image_id)
        digest.update(json.dumps([row.image_id, row.text_id, row.text]).encode())
    rows = np.flatnonzero(usable)
    groups = grouped(rows, pictures[rows])
    if unique_ids:
        firsts = groups.firsts
        before = first_equal(ids[firsts])
        for again in np.flatnonzero(before != np.arange(len(firsts)))[:1].tolist():
            one, other = int(firsts[before[again]]), int(firsts[again])
            raise DataError(
                f"the image id {source.row(other).image_id!r} stands for a picture in "
                f"{source.where(one)} and for one in {source.where(other)}; pack each file by "
                "itself, or to tar"
            )
    return groups, digest.hexdigest()


def _usable(source: Source, index: int) -> Row:
    row = source.row(index)
    if not row.text.strip():
        raise DataError(f"{source.where(index)}: its text is empty")
    return row


@dataclass(frozen=True, slots=True)
class _Work:
    """What a worker needs."""

    source: Source
    encoding: Encoding

    def sample(self, group: npt.NDArray[np.int64]) -> Sample | str:
        """Return a picture with its texts, or why it cannot be had."""
        rows = [self.source.row(index) for index in group.tolist()]
        first = int(group[0])
        try:
            image, suffix = encoded(self.source.image(first), self.encoding)
        except CNClipError as error:
            more = f" (and {len(rows) - 1} more texts of this picture)" if len(rows) > 1 else ""
            return located(self.source, first, error) + more
        return Sample(image, suffix, rows[0].image_id, [(row.text_id, row.text) for row in rows])

    def shard(self, job: tuple[Path, Groups]) -> dict[str, Any]:
        """Write a shard and, once it stands, what is in it."""
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

        with published(path) as temporary:
            write_shard(temporary, samples())
            with temporary.open("rb") as stream:
                checksum = hashlib.file_digest(stream, "sha256").hexdigest()
        told = {"name": path.name, "bytes": path.stat().st_size, "sha256": checksum}
        told |= {**counts, "skipped": skipped}
        _write_json(path.with_suffix(".json"), told)
        return told


def _pack_tars(
    work: _Work,
    groups: Groups,
    out: Path,
    plan: dict[str, Any],
    report: Packed,
    workers: int,
    overwrite: bool,
    tick: Callable[[int, int], None],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / LOCK, timeout=0):
        _begin(out, plan, overwrite)
        jobs = chunked(groups, plan["per_shard"])
        paths = [out / _name(number) for number in range(len(jobs))]
        told = _finished(out, paths)
        left = [(path, job) for path, job in zip(paths, jobs, strict=True) if path not in told]
        done = len(groups) - sum(len(job) for _, job in left)
        tick(done, len(groups))
        with mapped(work.shard, workers) as run:
            for (path, job), result in zip(left, run(left), strict=True):
                told[path] = result
                done += len(job)
                tick(done, len(groups))
        shards = [told[path] for path in paths]
        report.shards = len(shards)
        for shard in shards:
            report.images += shard["images"]
            report.pairs += shard["pairs"]
            report.bytes += shard["bytes"]
            report.skipped += shard["skipped"]
        summary = {"source": plan["source"], "images": report.images, "pairs": report.pairs}
        summary |= {"bytes": report.bytes, "skipped": report.skipped, "shards": shards}
        _write_json(out / _MANIFEST, summary)
        remove(out, [*(path.with_suffix(".json").name for path in paths), _PLAN])  # the plan last
    (out / LOCK).unlink(missing_ok=True)


def _finished(out: Path, paths: list[Path]) -> dict[Path, dict[str, Any]]:
    """Return what is told of the shards that stand: beside each, or in the manifest already."""
    listed = json_object_at(out / _MANIFEST).get("shards")
    records = [each for each in listed if _is_record(each)] if isinstance(listed, list) else []
    known = {each["name"]: each for each in records}
    found = {}
    for path in paths:
        beside = json_object_at(path.with_suffix(".json"))
        record = beside if _is_record(beside) else known.get(path.name)
        if record is not None and path.is_file():
            found[path] = record
    return found


def _is_record(value: object) -> bool:
    """Tell whether a value is the record of a finished shard; a damaged one is packed again."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return False
    skipped = value.get("skipped")
    return (
        all(type(value.get(key)) is int for key in ("images", "pairs", "bytes"))
        and isinstance(skipped, list)
        and all(isinstance(each, str) for each in skipped)
    )


def _begin(out: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Take up what the same plan began, or start in an empty folder."""
    sweep(out, _HALF_WRITTEN)
    held = set(entries(out))
    begun = json_object_at(out / _PLAN)
    if begun != plan:
        if held and not overwrite:
            told = "was begun from other data or with other options" if begun else "is not empty"
            raise UsageError(f"{out} {told}; give another place, or --overwrite to begin anew")
        reason = _OBJECTION(out)  # once more: it was claimed before the lock was had
        if reason is not None:
            raise UsageError(f"{out} {reason}; give another place")
        remove(out, held)
        _write_json(out / _PLAN, plan)


def _pack_official(
    work: _Work,
    groups: Groups,
    out: Path,
    to: Target,
    split: str,
    report: Packed,
    workers: int,
    tick: Callable[[int, int], None],
) -> None:
    def samples(results: Iterator[Sample | str]) -> Iterator[Sample]:
        for number, sample in enumerate(results, 1):
            if isinstance(sample, str):
                report.skipped.append(sample)
            else:
                report.images += 1
                report.pairs += len(sample.texts)
                yield sample
            tick(number, len(groups))

    write = partial(write_tsv, split=split) if to == "tsv" else write_lmdb
    with (
        published_folder(out, "pack", objection=_OBJECTION, also=_OF_READERS) as folder,
        mapped(work.sample, workers) as run,
    ):
        write(folder, samples(run(groups)))
        report.shards = 1
        report.bytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _first(report: Packed) -> str:
    return report.skipped[0] if report.skipped else "all are left out"


def _write_json(path: Path, value: Any) -> None:
    with published(path) as temporary:
        text = json.dumps(value, ensure_ascii=False, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")

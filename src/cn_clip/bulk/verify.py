"""Whether all that the manifests claim is there; what has to be computed again."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cn_clip.bulk.manifest import (
    Manifest,
    data_names,
    manifest_name,
    parse_manifest,
    quarantine_name,
)
from cn_clip.bulk.plan import Plan, Planned, existing_plans, plan_of, shard_count
from cn_clip.bulk.run import done_shards
from cn_clip.bulk.status import OnRead, manifests
from cn_clip.bulk.store import Store
from cn_clip.errors import DataError
from cn_clip.translation import _

_FOLDERS = ("img_emb", "text_emb", "metadata", "quarantine")
_NUMBER = re.compile(r"(?:.*_)?(\d{5,})\.(?:npy|parquet|jsonl)")
_MAX_LISTED = 1000
_BLOCK = 8 << 20
_ABSENT = -1


@dataclass(slots=True)
class Verified:
    """What was checked.

    Attributes:
        shards, rows: that are planned.
        done: shards whose manifest and files are as they should be.
        rows_out, quarantined: of them.
        missing: shards that are not done, damaged ones excluded.
        damaged: shard -> what is wrong, for the first ones.
        damages: how many shards are damaged.
        leftovers: files of shards that are not done.
        orphans: names of files that are of no shard, the first ones.
        discarded: manifests that were removed.
    """

    shards: int = 0
    rows: int = 0
    done: int = 0
    rows_out: int = 0
    quarantined: int = 0
    missing: list[range] = field(default_factory=list)
    damaged: dict[int, str] = field(default_factory=dict)
    damages: int = 0
    leftovers: int = 0
    orphans: list[str] = field(default_factory=list)
    discarded: int = 0

    @property
    def complete(self) -> bool:
        """Whether every input is in a sound shard, or in its quarantine."""
        return self.done == self.shards and self.rows == self.rows_out + self.quarantined


def verify(
    store: Store,
    *,
    checksums: bool = False,
    discard: bool = False,
    on_read: OnRead = lambda done, total: None,
) -> Verified:
    """Compare the manifests of an output with its plans and its files.

    Args:
        store: the output.
        checksums: read all files and compare their SHA-256; otherwise their sizes are compared.
        discard: remove the manifests of damaged shards, so that they are computed again.
        on_read: called with the number of shards so far.

    Raises:
        UsageError: there is no plan.
        DataError: a plan is damaged, or the store cannot be reached.
    """
    plans = existing_plans(store)
    result = Verified(shard_count(plans), sum(plan.rows for plan in plans))
    done = done_shards(store, plans)  # before the files: a manifest is written after its files
    sizes = {folder: _sizes(store, folder, result) for folder in _FOLDERS}
    for read, (number, _entry, content) in enumerate(manifests(store, result.shards), 1):
        if not done[number]:  # it was finished meanwhile
            continue
        plan = plan_of(plans, number)
        problem: str | None
        try:
            manifest = parse_manifest(content, f"{store.name}/{manifest_name(number)}")
        except DataError as error:
            problem = str(error)
        else:  # not above: a lost plan, or a store that does not answer, is no damage of a shard
            problem = _problem(Planned(store, plan), number, manifest, sizes)
            if problem is None and checksums:
                problem = _wrong_checksum(store, manifest)
        if problem is None:
            result.done += 1
            result.rows_out += manifest.rows_out
            result.quarantined += manifest.quarantined
        else:
            _add_damage(result, store, number, problem, discard)
        if not read % 1000:
            on_read(read, result.shards)
    result.missing = ranges_of(np.flatnonzero(~done))
    result.leftovers = sum(int((size[~done] != _ABSENT).sum()) for size in sizes.values())
    return result


def ranges_of(numbers: npt.NDArray[np.int64]) -> list[range]:
    """Return sorted numbers as ranges."""
    if not len(numbers):
        return []
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [range(int(part[0]), int(part[-1]) + 1) for part in np.split(numbers, cuts)]


def _sizes(store: Store, folder: str, result: Verified) -> npt.NDArray[np.int64]:
    """Return the size of each shard's file in a folder, and list files of no shard."""
    sizes = np.full(result.shards, _ABSENT, np.int64)
    for entry in store.entries(folder):
        match = _NUMBER.fullmatch(entry.name)
        if match and int(match[1]) < len(sizes):
            sizes[int(match[1])] = entry.size
        elif len(result.orphans) < _MAX_LISTED:
            result.orphans.append(f"{folder}/{entry.name}")
    return sizes


def _problem(
    planned: Planned, number: int, manifest: Manifest, sizes: dict[str, npt.NDArray[np.int64]]
) -> str | None:
    """Return what is wrong with a shard, its checksums aside."""
    plan, shard = planned.plan, planned.shard(number)
    given = manifest.shard, manifest.plan, manifest.key, manifest.rows_in
    if given != (number, plan.digest, f"{shard.key:016x}", shard.count):
        return _("its manifest is of another plan")
    if manifest.model != plan.model.fingerprint:
        return _("it was computed with another model than planned")
    wanted = _expected_names(plan, number, manifest)
    if set(manifest.files) != wanted:
        return _("its manifest lists other files than a shard has")
    for name, written in manifest.files.items():
        size = int(sizes[name.partition("/")[0]][number])
        if size != written.bytes:
            return (
                _("{name} is missing", name=name)
                if size == _ABSENT
                else _("{name} has another size than written", name=name)
            )
    return None


def _expected_names(plan: Plan, number: int, manifest: Manifest) -> set[str]:
    names = set(data_names(number, plan.embed))
    return names | {quarantine_name(number)} if manifest.quarantined else names


def _wrong_checksum(store: Store, manifest: Manifest) -> str | None:
    for name, written in manifest.files.items():
        digest, at = hashlib.sha256(), 0
        while at < written.bytes and (
            content := store.read(name, at, min(at + _BLOCK, written.bytes))
        ):
            digest.update(content)
            at += len(content)
        if digest.hexdigest() != written.sha256:
            return _("{name} has changed since it was written", name=name)
    return None


def _add_damage(result: Verified, store: Store, number: int, problem: str, discard: bool) -> None:
    result.damages += 1
    if len(result.damaged) < _MAX_LISTED:
        result.damaged[number] = problem
    if discard:
        store.remove(manifest_name(number))
        result.discarded += 1

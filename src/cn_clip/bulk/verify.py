"""Whether all that the manifests claim is there; what has to be computed again."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cn_clip.bulk.manifest import (
    NAME,
    Manifest,
    data_names,
    manifest_name,
    parse_manifest,
    quarantine_name,
)
from cn_clip.bulk.plan import (
    Plan,
    Planned,
    check_version,
    existing_plans,
    plan_of,
    shard_count,
)
from cn_clip.bulk.run import check_driving, driving
from cn_clip.bulk.store.base import Store, read_many
from cn_clip.bulk.store.bucket import COMMITS, STAGED
from cn_clip.bulk.summary import (
    ABSENT,
    FOLDERS,
    OnRead,
    Rows,
    identity_of,
    named,
    read_manifests,
)
from cn_clip.errors import DataError, UnavailableError
from cn_clip.translation import _

_NUMBER = re.compile(r"(?:.*_)?(\d{5,})\.(?:npy|parquet|jsonl)")
_MAX_LISTED = 1000
_BLOCK = 8 << 20
_ROWS = 1 << 16  # of the table of shards that are compared at a time
_TOGETHER = 4096  # manifests that are read at a time
_STAGED = re.compile(r"(\d{5,})-[0-9a-f]{16}-.+")


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
        leftovers: files of shards that are not done, unfinished ones included.
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
        discard: remove the manifests of damaged shards, so that they are computed again, and the
            unfinished files of done shards; not while another process drives a run.
        on_read: called with the number of shards so far.

    Raises:
        UsageError: there is no plan, a manifest is of a newer version, or shards are to be
            discarded that another version of this package computed.
        DataError: a plan is damaged, or the store cannot be reached.
        BusyError: another process drives a run, whose shards are to be discarded.
    """
    plans = existing_plans(store)
    if not discard:
        return _verify(store, plans, checksums, on_read).result
    for plan in plans:
        check_version(plan, store.name)
    with driving(store) as lost:
        _end_commits(store)
        found = _verify(store, plans, checksums, on_read)
        # Only now: a manifest of a newer version ends this before anything is discarded.
        for number in found.damaged:
            check_driving(store, lost)
            store.discard(manifest_name(number))
        for name in found.late:
            store.remove(name)
        found.result.discarded = len(found.damaged)
    return found.result


@dataclass(frozen=True, slots=True)
class _Found:
    """What was checked, and what may be discarded.

    Attributes:
        damaged: numbers of all damaged shards.
        late: names of unfinished files of done shards, of processes that came too late.
    """

    result: Verified
    damaged: array[int] = field(default_factory=lambda: array("Q"))
    late: list[str] = field(default_factory=list)


def _verify(store: Store, plans: list[Plan], checksums: bool, on_read: OnRead) -> _Found:
    result = Verified(shard_count(plans), sum(plan.rows for plan in plans))
    found = _Found(result)
    # Before the files: a manifest is written after its files.
    manifests = read_manifests(store, result.shards, on_read)
    rows, done = manifests.rows, manifests.exist
    sizes = {folder: _sizes(store, folder, result) for folder in FOLDERS}
    sound = done & _are_planned(store, plans, rows)
    if checksums:  # all are judged by their manifests, which hold them
        sound[:] = False
    for column, folder in enumerate(FOLDERS):
        listed = rows["files"][:, column]
        sound &= (listed == ABSENT) | (listed == sizes[folder])
    result.done = int(sound.sum())
    result.rows_out = int(rows["rows_out"][sound].sum(dtype=np.int64))
    result.quarantined = int(rows["quarantined"][sound].sum(dtype=np.int64))
    suspects = np.flatnonzero(done & ~sound)
    for start in range(0, len(suspects), _TOGETHER):
        numbers = suspects[start : start + _TOGETHER].tolist()
        names = [manifest_name(number) for number in numbers]
        for number, content in zip(numbers, read_many(store, names), strict=True):
            if content is None:  # discarded meanwhile
                done[number] = False
            else:
                _judge(store, plans, number, content, sizes, checksums, found)
        on_read(start + len(numbers), len(suspects))
    result.missing = ranges_of(np.flatnonzero(~done))
    result.leftovers = sum(int((size[~done] != ABSENT).sum()) for size in sizes.values())
    for number, name in _staged(store, result.shards):
        if done[number]:
            found.late.append(name)
        else:
            result.leftovers += 1
    result.orphans += found.late[: _MAX_LISTED - len(result.orphans)]
    result.damages = len(found.damaged)
    return found


def _are_planned(store: Store, plans: list[Plan], rows: Rows) -> npt.NDArray[np.bool_]:
    """Return for each shard whether its manifest is of its plan, model and inputs."""
    planned = np.zeros(len(rows), np.bool_)
    for plan in plans:
        plain = sorted(named(name, plan.first) for name in data_names(plan.first, plan.embed))
        more = sorted([*plain, named(quarantine_name(plan.first), plan.first)])
        for start in range(plan.first, plan.first + plan.shards, _ROWS):
            part = slice(start, min(start + _ROWS, plan.first + plan.shards))
            table = Planned(store, plan).rows(part.start, part.stop)
            of = plan.digest, plan.model.fingerprint
            identity = np.where(
                rows["quarantined"][part] > 0,
                identity_of(*of, more, table["key"], table["count"]),
                identity_of(*of, plain, table["key"], table["count"]),
            )
            planned[part] = rows["identity"][part] == identity
    return planned


def _judge(
    store: Store,
    plans: list[Plan],
    number: int,
    content: bytes,
    sizes: dict[str, npt.NDArray[np.int64]],
    checksums: bool,
    found: _Found,
) -> None:
    """Count a shard as done, or list it as damaged, by its manifest itself."""
    problem: str | None
    try:
        manifest = parse_manifest(content, f"{store.name}/{manifest_name(number)}")
    except DataError as error:
        problem = str(error)
    else:  # not above: a lost plan, or a store that does not answer, is no damage of a shard
        problem = _problem(Planned(store, plan_of(plans, number)), number, manifest, sizes)
        if problem is None and checksums:
            problem = _wrong_checksum(store, manifest)
    if problem is None:
        found.result.done += 1
        found.result.rows_out += manifest.rows_out
        found.result.quarantined += manifest.quarantined
        return
    found.damaged.append(number)
    if len(found.result.damaged) < _MAX_LISTED:
        found.result.damaged[number] = problem


def _end_commits(store: Store) -> None:
    """End what processes had begun to complete; what cannot be ended is computed again."""
    for each in store.names(COMMITS):
        if match := NAME.fullmatch(each):
            name = manifest_name(int(match[1]))
            try:
                store.completed(name)
            except UnavailableError:
                raise
            except DataError:
                store.discard(name)


def _staged(store: Store, shards: int) -> Iterator[tuple[int, str]]:
    """Yield shard and name of each unfinished file."""
    for name in store.names(STAGED):
        match = _STAGED.fullmatch(name)
        if match and int(match[1]) < shards:
            yield int(match[1]), f"{STAGED}/{name}"


def ranges_of(numbers: npt.NDArray[np.int64]) -> list[range]:
    """Return sorted numbers as ranges."""
    if not len(numbers):
        return []
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [range(int(part[0]), int(part[-1]) + 1) for part in np.split(numbers, cuts)]


def _sizes(store: Store, folder: str, result: Verified) -> npt.NDArray[np.int64]:
    """Return the size of each shard's file in a folder, and list files of no shard."""
    sizes: npt.NDArray[np.int64] = np.broadcast_to(np.int64(ABSENT), result.shards)  # no memory
    for entry in store.entries(folder):
        match = _NUMBER.fullmatch(entry.name)
        if match and int(match[1]) < len(sizes):
            if not sizes.flags.writeable:
                sizes = np.array(sizes)
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
                if size == ABSENT
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

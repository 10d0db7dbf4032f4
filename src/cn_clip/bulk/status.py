"""How far a run is, from its manifests alone; it may run meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.bulk.manifest import NAME
from cn_clip.bulk.plan import existing_plans, shard_count
from cn_clip.bulk.shard import NOTES
from cn_clip.bulk.store.base import Store, read_many
from cn_clip.bulk.summary import ABSENT, FOLDERS, OnRead, read_manifests

_RECENT = 200  # shards that the rate is measured over
_GAP = 600.0  # seconds without a finished shard, after which the rate is measured anew
_MAX_LISTED = 1000


@dataclass(slots=True)
class Status:
    """How far a run is.

    Attributes:
        plans, shards, rows: that are planned.
        done: shards with a manifest.
        rows_out, quarantined, bytes: of them, damaged ones excluded.
        damaged: manifests that cannot be read; ``verify`` finds damaged files.
        attempts: of the done shards, from 1 each.
        seconds: of computing them, summed over workers.
        running: shards that were begun, and neither ended nor failed.
        failed: shard -> why its last attempt failed, for the first ones.
        failures: how many shards failed.
        rate: inputs per second lately; 0 if unknown.
    """

    plans: int = 0
    shards: int = 0
    rows: int = 0
    done: int = 0
    rows_out: int = 0
    quarantined: int = 0
    bytes: int = 0
    damaged: int = 0
    attempts: int = 0
    seconds: float = 0.0
    running: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    failures: int = 0
    rate: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at this rate; None if that is unknown."""
        rest = self.rows - self.rows_out - self.quarantined
        if not rest:
            return 0.0
        return rest / self.rate if self.rate else None


def status_of(store: Store, on_read: OnRead = lambda done, total: None) -> Status:
    """Read all manifests of an output.

    Raises:
        UsageError: it holds no plan, or a manifest of a newer version.
        DataError: a plan is damaged, or the store cannot be reached.
    """
    plans = existing_plans(store)
    status = Status(len(plans), shard_count(plans), sum(plan.rows for plan in plans))
    manifests = read_manifests(store, status.shards, on_read)
    rows, exist = manifests.rows, manifests.exist
    status.done, status.damaged = int(exist.sum()), manifests.damaged
    status.rows_out = int(rows["rows_out"].sum(dtype=np.int64))
    status.quarantined = int(rows["quarantined"].sum(dtype=np.int64))
    status.attempts = int(rows["attempt"].sum(dtype=np.int64))
    status.seconds = round(float(rows["seconds"].sum(dtype=np.float64)), 3)
    for column in range(len(FOLDERS)):
        sizes = rows["files"][:, column]
        status.bytes += int(sizes[(rows["state"] != 0) & (sizes != ABSENT)].sum())
    status.rate = rate_of(manifests.modified, rows["rows_in"])
    for number, note in _notes(store, status.shards):
        if exist[number]:
            continue  # it ended meanwhile
        if note.get("error") is None:
            status.running += 1
            continue
        status.failures += 1
        if len(status.failed) < _MAX_LISTED:
            status.failed[number] = str(note["error"])
    return status


def rate_of(times: npt.NDArray[np.float64], rows: npt.NDArray[np.uint32]) -> float:
    """Return the inputs per second of the latest shards; 0 if fewer than two are done.

    The times are of one clock, that of the store, so the clocks of the workers do not count.
    """
    done = np.flatnonzero(~np.isnan(times))
    recent = done[np.argsort(times[done], kind="stable")][-_RECENT:]
    ends = times[recent]
    gaps = np.flatnonzero(np.diff(ends) > _GAP)
    start = int(gaps[-1]) + 1 if len(gaps) else 0
    span = float(ends[-1] - ends[start]) if len(ends) else 0.0
    return float(rows[recent[start + 1 :]].sum()) / span if span else 0.0


def _notes(store: Store, shards: int) -> Iterator[tuple[int, dict[str, Any]]]:
    names = [
        name
        for name in store.names(NOTES)
        if (match := NAME.fullmatch(name)) and int(match[1]) < shards
    ]
    contents = read_many(store, [f"{NOTES}/{name}" for name in names])
    for name, content in zip(names, contents, strict=True):
        try:
            values = json.loads(content or b"{}")
        except ValueError:
            continue
        if isinstance(values, dict):
            yield int(name.partition(".")[0]), values

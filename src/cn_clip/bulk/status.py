"""How far a run is, from its manifests alone; it may run meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.bulk.manifest import FOLDER, NAME
from cn_clip.bulk.plan import existing_plans, shard_count
from cn_clip.bulk.shard import NOTES
from cn_clip.bulk.store import Entry, FolderStore, Store

_RECENT = 200  # shards that the rate is measured over
_GAP = 600.0  # seconds without a finished shard, after which the rate is measured anew
_MAX_LISTED = 1000
_THREADS = 32  # requests to a bucket at once

OnRead = Callable[[int, int | None], None]


@dataclass(slots=True)
class Status:
    """How far a run is.

    Attributes:
        plans, shards, rows: that are planned.
        done: shards with a manifest.
        rows_out, quarantined, bytes: of them.
        damaged: manifests that cannot be read.
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
    """Read all manifests of an output; the memory is 12 bytes per shard.

    Raises:
        UsageError: it holds no plan.
        DataError: a plan is damaged, or the store cannot be reached.
    """
    plans = existing_plans(store)
    status = Status(len(plans), shard_count(plans), sum(plan.rows for plan in plans))
    times = np.full(status.shards, np.nan)
    rows = np.zeros(status.shards, np.uint32)
    for number, entry, content in manifests(store, status.shards):
        status.done += 1
        if not _count(status, content, rows, number):
            status.damaged += 1
        times[number] = entry.modified
        if not status.done % 1000:
            on_read(status.done, status.shards)
    status.rate = rate_of(times, rows)
    for number, note in _notes(store, status.shards):
        if not np.isnan(times[number]):
            continue  # it ended meanwhile
        if note.get("error") is None:
            status.running += 1
            continue
        status.failures += 1
        if len(status.failed) < _MAX_LISTED:
            status.failed[number] = str(note["error"])
    return status


def manifests(store: Store, shards: int) -> Iterator[tuple[int, Entry, bytes]]:
    """Yield number, entry and content of each manifest, in the order of the listing."""
    entries = (
        (int(match[1]), entry)
        for entry in store.entries(FOLDER)
        if (match := NAME.fullmatch(entry.name)) and int(match[1]) < shards
    )
    names = ((number, entry, f"{FOLDER}/{entry.name}") for number, entry in entries)
    for number, entry, content in read_all(store, names):
        if content is not None:  # discarded meanwhile
            yield number, entry, content


def read_all(
    store: Store, names: Iterable[tuple[int, Entry, str]]
) -> Iterator[tuple[int, Entry, bytes | None]]:
    """Yield the contents of files; those of a bucket are asked for many at a time."""
    if isinstance(store, FolderStore):
        for number, entry, name in names:
            yield number, entry, store.read(name)
        return
    names = iter(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        while some := list(islice(names, 8 * _THREADS)):
            contents = pool.map(lambda each: store.read(each[2]), some)
            for (number, entry, _name), content in zip(some, contents, strict=True):
                yield number, entry, content


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


def _count(status: Status, content: bytes, rows: npt.NDArray[np.uint32], number: int) -> bool:
    """Add a manifest to the counts; return False if it is damaged."""
    try:
        values = json.loads(content)
        size = sum(int(file["bytes"]) for file in values["files"].values())
        counts = [int(values[name]) for name in ("rows_out", "quarantined", "attempt")]
        seconds = float(values["seconds"])
        rows[number] = values["rows_in"]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return False
    status.rows_out += counts[0]
    status.quarantined += counts[1]
    status.attempts += counts[2]
    status.seconds += seconds
    status.bytes += size
    return True


def _notes(store: Store, shards: int) -> Iterator[tuple[int, dict[str, Any]]]:
    names = (
        (int(match[1]), entry, f"{NOTES}/{entry.name}")
        for entry in store.entries(NOTES)
        if (match := NAME.fullmatch(entry.name)) and int(match[1]) < shards
    )
    for number, _entry, content in read_all(store, names):
        try:
            values = json.loads(content or b"{}")
        except ValueError:
            continue
        if isinstance(values, dict):
            yield number, values

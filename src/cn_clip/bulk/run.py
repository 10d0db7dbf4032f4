"""A bulk run: the shards that have no manifest, given to an engine by the one driver of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import Event

import numpy as np
import numpy.typing as npt

from cn_clip.bulk.engines.base import Engine, Task
from cn_clip.bulk.manifest import FOLDER, NAME
from cn_clip.bulk.plan import Plan, check_version, existing_plans, shard_count
from cn_clip.bulk.shard import note_failure
from cn_clip.bulk.store.base import BusyError, Store
from cn_clip.errors import UsageError
from cn_clip.translation import _

_MAX_LISTED = 1000  # failed shards whose errors a report keeps


@dataclass(frozen=True, slots=True)
class Portion:
    """The shards whose number modulo ``of`` is ``index``, as of one task of an array of jobs."""

    index: int = 0
    of: int = 1

    @property
    def lock(self) -> str:
        """The name of the lock of its driver."""
        return f"driver-{self.index}-of-{self.of}.lock"

    def overlaps(self, lock: str) -> bool:
        """Return whether a lock is of the driver of a portion with a shard of this one."""
        match = re.fullmatch(r"driver-(\d+)-of-(\d+)\.lock", lock)
        if match is None:
            return False
        return (int(match[1]) - self.index) % math.gcd(int(match[2]), self.of) == 0


@dataclass(slots=True)
class Report:
    """What a run did.

    Attributes:
        shards: of all plans, or of the portion.
        earlier: done before.
        done: finished by this run.
        failed: shard -> why, for the first ones.
        failures: how many shards failed.
        rows, quarantined: of the shards that this run finished.
    """

    shards: int = 0
    earlier: int = 0
    done: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    failures: int = 0
    rows: int = 0
    quarantined: int = 0


OnProgress = Callable[[Report], None]


def run(
    store: Store,
    engine: Engine,
    task: Task,
    *,
    portion: Portion = Portion(),
    on_progress: OnProgress = lambda report: None,
) -> Report:
    """Compute all shards that are not done.

    Args:
        store: the output, which holds a plan.
        engine: runs the shards.
        task: what each worker is given.
        portion: of the shards; other portions may run at the same time.
        on_progress: called after each shard.

    Raises:
        UsageError: there is no plan, or one of another version of this package.
        BusyError: another process drives the run, or a part of this portion of it.
        CNClipError: no shard can succeed; finished ones stay.
    """
    plans = existing_plans(store)
    for plan in plans:
        check_version(plan, store.name)
    if not 0 <= portion.index < portion.of:
        raise UsageError(
            _(
                "portion {index}/{of}: give INDEX/OF with an index from 0 to {last}",
                index=portion.index,
                of=portion.of,
                last=portion.of - 1,
            )
        )
    with driving(store, portion) as lost:
        missing = missing_shards(store, plans)
        missing = missing[missing % portion.of == portion.index]
        total = len(range(portion.index, shard_count(plans), portion.of))
        report = Report(total, total - len(missing))
        on_progress(report)
        for outcome in engine(task, _numbers(store, missing, lost)):
            check_driving(store, lost)
            if outcome.error is None:
                report.done += 1
                report.rows += outcome.rows_out
                report.quarantined += outcome.quarantined
            else:
                report.failures += 1
                note_failure(store, outcome.shard, outcome.error)
                if len(report.failed) < _MAX_LISTED:
                    report.failed[outcome.shard] = outcome.error
            on_progress(report)
    return report


def driving(store: Store, portion: Portion = Portion()) -> AbstractContextManager[Event]:
    """Hold the lock of a driver; the event is for ``check_driving``.

    Raises:
        BusyError: another process drives a portion that has a shard of this one.
    """
    return store.lock(portion.lock, portion.overlaps)


def check_driving(store: Store, lost: Event) -> None:
    """Raise a ``BusyError`` if another process has taken the lock of this driver."""
    if lost.is_set():
        raise BusyError(
            _(
                "another process drives {out} now, as this one did not renew its lock in time; "
                "see: cn-clip bulk status {out}",
                out=store.name,
            )
        )


def missing_shards(store: Store, plans: list[Plan]) -> npt.NDArray[np.int64]:
    """Return the numbers of the shards without a manifest, in order."""
    return np.flatnonzero(~done_shards(store, plans))


def done_shards(store: Store, plans: list[Plan]) -> npt.NDArray[np.bool_]:
    """Return for each shard whether it has a manifest."""
    done = np.zeros(shard_count(plans), np.bool_)
    for name in store.names(FOLDER):
        if (match := NAME.fullmatch(name)) and int(match[1]) < len(done):
            done[int(match[1])] = True
    return done


def _numbers(store: Store, shards: npt.NDArray[np.int64], lost: Event) -> Iterator[int]:
    for number in shards:
        check_driving(store, lost)
        yield int(number)

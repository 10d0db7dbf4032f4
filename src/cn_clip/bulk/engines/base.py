"""What all engines share: one attempt at a shard, and the shards that wait for one."""

from __future__ import annotations

import errno
import heapq
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from cn_clip.bulk.shard import run_shard
from cn_clip.bulk.store.base import BusyError
from cn_clip.errors import CNClipError, UsageError
from cn_clip.translation import _

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_BUSY_PAUSE = 1.0  # seconds until a shard of another process is tried again


@dataclass(frozen=True, slots=True)
class Task:
    """What an engine runs shards of.

    Attributes:
        place: the output.
        device: of the plan: ``auto``, ``cpu``, ``cuda``, ...
        accept_missing: finish shards of which no input can be read.
        retries: how often a failed shard is tried again.
    """

    place: str
    device: str = "auto"
    accept_missing: bool = False
    retries: int = 2


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt at a shard ended.

    Attributes:
        shard: its number.
        rows_out, quarantined: of its manifest, if it is done.
        error: why it is not done.
        busy: another process computes it.
        fatal: every other shard would fail too.
    """

    shard: int
    rows_out: int = 0
    quarantined: int = 0
    error: str | None = None
    busy: bool = False
    fatal: bool = False


class Engine(Protocol):
    """Runs shards, and yields the last outcome of each as it ends."""

    def __call__(self, task: Task, shards: Iterable[int]) -> Iterator[Outcome]: ...


def attempt(task: Task, number: int, device: str | None = None) -> Outcome:
    """Try a shard once, in a worker; errors are part of the outcome."""
    try:
        manifest = run_shard(task.place, number, accept_missing=task.accept_missing, device=device)
    except BusyError as error:
        return Outcome(number, error=str(error), busy=True)
    except UsageError as error:
        return Outcome(number, error=str(error), fatal=True)
    except CNClipError as error:
        return Outcome(number, error=str(error))
    except OSError as error:
        reason = error.strerror or str(error)
        message = _(
            "could not write {path}: {reason}; finished shards stay. Free some space and run the "
            "same command again",
            path=task.place,
            reason=reason,
        )
        return Outcome(number, error=message, fatal=error.errno in _FULL)
    # A runtime raises any kind of exception, such as that memory is exhausted. The worker goes on.
    except Exception as error:
        return Outcome(number, error=f"{type(error).__name__}: {error}")
    return Outcome(number, manifest.rows_out, manifest.quarantined)


class Waiting:
    """Shards that wait for an attempt: new ones, then failed ones, then those of others."""

    def __init__(self, shards: Iterable[int], retries: int) -> None:
        self._new = iter(shards)
        self._again: deque[int] = deque()
        self._later: list[tuple[float, int]] = []  # heap of (time, shard)
        self._failures: Counter[int] = Counter()
        self._retries = retries

    def next(self) -> int | None:
        """Return a shard to try now, if there is one."""
        number = next(self._new, None)
        if number is not None:
            return number
        if self._again:
            return self._again.popleft()
        if self._later and self._later[0][0] <= time.monotonic():
            return heapq.heappop(self._later)[1]
        return None

    @property
    def is_empty(self) -> bool:
        """Whether no shard waits any more; only after ``next`` returned None."""
        return not self._again and not self._later

    def settle(self, outcome: Outcome) -> bool:
        """Take an outcome; return whether it is the last one of its shard."""
        if outcome.fatal:
            raise CNClipError(outcome.error or "")
        if outcome.busy:
            heapq.heappush(self._later, (time.monotonic() + _BUSY_PAUSE, outcome.shard))
            return False
        if outcome.error is None:
            return True
        self._failures[outcome.shard] += 1
        if self._failures[outcome.shard] > self._retries:
            return True
        self._again.append(outcome.shard)
        return False

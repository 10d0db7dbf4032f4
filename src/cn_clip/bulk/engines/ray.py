"""Shards on a Ray cluster: one actor per model, started again when it or its machine dies.

Ray schedules. Only the manifests say what is done, so neither its task retries nor its checkpoints
are used. More actors than the cluster has room for wait, which makes Ray's autoscaler
add machines.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cn_clip.bulk.engines.base import Outcome, Task, Waiting, attempt
from cn_clip.data.ray_cluster import LOOK, Cluster, WorkerSetup, check_alive
from cn_clip.errors import CNClipError
from cn_clip.translation import _

_POLL = 0.5  # seconds between looks at shards of other processes
_MAX_DEATHS = 10  # of an actor in a row, each with a shard
_PING_PAUSE = 1.0  # seconds until an actor that does not answer is asked again
_MAX_PINGS = 120  # without an answer


@dataclass(frozen=True, slots=True)
class RayEngine:
    """Actors of a Ray cluster."""

    cluster: Cluster

    def __call__(self, task: Task, shards: Iterable[int]) -> Iterator[Outcome]:
        """Yield the outcomes of shards.

        Raises:
            UsageError: Ray is not installed.
            CNClipError: the cluster cannot be reached, no shard can succeed, or actors die.
        """
        with self.cluster.connected() as ray:
            actors = _Actors(ray, self.cluster, task)
            try:
                yield from actors.run(Waiting(shards, task.retries))
            finally:
                actors.stop()


class _Worker:
    """An actor: a process with a model."""

    def __init__(self, setup: WorkerSetup, task: Task) -> None:
        setup()
        self._task = task

    def ready(self) -> None:
        """Return once this actor has been started."""

    def run(self, number: int) -> Outcome:
        """Try a shard."""
        return attempt(self._task, number)


@dataclass(slots=True)
class _Slot:
    """An actor, what it does now, and how often it died or did not answer in a row."""

    actor: Any
    shard: int | None = None
    deaths: int = 0
    pings: int = 0
    ask_at: float = 0.0


class _Actors:
    """Actors, each with at most one shard: no more is lost with one of them."""

    def __init__(self, ray: Any, cluster: Cluster, task: Task) -> None:
        self._ray = ray
        self._class = cluster.remote_class(ray, _Worker, retries=0)
        self._given = cluster.setup, task
        self._waits: dict[Any, _Slot] = {}  # a future -> its actor
        self._absent: list[_Slot] = []  # actors that are asked whether they are ready
        self._idle: list[_Slot] = []
        self._heard = time.monotonic()
        self._slots = [
            _Slot(self._class.remote(*self._given)) for _each in range(cluster.count(ray))
        ]
        self._absent += self._slots

    def run(self, waiting: Waiting) -> Iterator[Outcome]:
        """Give every idle actor a shard, until none is left."""
        while True:
            self._ask()
            while self._idle and (number := waiting.next()) is not None:
                slot = self._idle.pop()
                slot.shard = number
                self._waits[slot.actor.run.remote(number)] = slot
            running = any(slot.shard is not None for slot in self._waits.values())
            if self._idle and not running and waiting.is_empty:
                return
            for future in self._ended():
                slot = self._waits.pop(future)
                outcome = self._take(slot, future)
                if outcome is not None and waiting.settle(outcome):
                    yield outcome

    def stop(self) -> None:
        """End all actors; shards that are not done have to be computed again."""
        for slot in self._slots:
            self._ray.kill(slot.actor)

    def _ask(self) -> None:
        """Ask the absent actors whether they are ready."""
        now = time.monotonic()
        due = [slot for slot in self._absent if slot.ask_at <= now]
        self._absent = [slot for slot in self._absent if slot.ask_at > now]
        for slot in due:
            self._waits[slot.actor.ready.remote()] = slot

    def _ended(self) -> list[Any]:
        """Wait a moment; return what has ended."""
        if not self._waits:
            time.sleep(_POLL)
            return []
        ended: list[Any] = self._ray.wait(list(self._waits), timeout=_POLL)[0]
        if ended:
            self._heard = time.monotonic()
        elif time.monotonic() - self._heard > LOOK:
            check_alive(self._ray)
            self._heard = time.monotonic()
        return ended

    def _take(self, slot: _Slot, future: Any) -> Outcome | None:
        """Return the outcome of an actor's shard; None if it had none."""
        number, slot.shard = slot.shard, None
        try:
            outcome: Outcome | None = self._ray.get(future)
        except self._ray.exceptions.RayError as error:
            self._lose(slot, number, error)
            if number is None:
                return None
            return Outcome(number, error=_("its worker died, possibly out of memory"))
        slot.pings = 0
        if number is not None:
            slot.deaths = 0
        self._idle.append(slot)
        return outcome

    def _lose(self, slot: _Slot, number: int | None, error: Exception) -> None:
        """Ask an actor again later, which Ray starts again; or give up."""
        if number is None:
            slot.pings += 1
            slot.ask_at = time.monotonic() + _PING_PAUSE
        else:
            slot.deaths += 1
        if slot.deaths > _MAX_DEATHS or slot.pings > _MAX_PINGS:
            raise CNClipError(
                _(
                    "an actor of Ray dies again and again: {reason}",
                    reason=str(error).partition("\n")[0],
                )
            )
        if isinstance(error, self._ray.exceptions.ActorDiedError):  # Ray does not start it again
            slot.actor = self._class.remote(*self._given)
        self._absent.append(slot)

"""Map a function over jobs on a Ray cluster, in order."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from cn_clip.data.ray_cluster import LOOK, Cluster, WorkerSetup, check_alive
from cn_clip.errors import DataError
from cn_clip.translation import _

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
_AHEAD = 4  # jobs per worker that are not yielded: workers never wait, few results do
_QUEUED = 2  # of them given to a worker: it goes on while its result is fetched
_RETRIES = 3  # of a job whose worker died


@contextmanager
def ray_map(
    function: Callable[[_Job], _Result], cluster: Cluster
) -> Iterator[Callable[[Sequence[_Job]], Iterator[_Result]]]:
    """Yield a map of ``function`` over jobs, as ``process_map.parallel_map`` does.

    A job whose worker dies is run again, so running the function twice must do no harm.

    Raises:
        UsageError: Ray is not installed.
        CNClipError: the cluster cannot be reached.
        DataError: workers died again and again.
        CNClipError: the cluster ended.
    """
    with cluster.connected() as ray:
        kind = cluster.remote_class(ray, _Worker, retries=_RETRIES)
        # It may be large. Each job brings it, in a list so that only the first one fetches it: what
        # the constructor takes from the object store may be lost when an actor starts again.
        shared = [ray.put(function)]
        actors = [kind.remote(cluster.setup) for _each in range(cluster.count(ray))]
        try:
            yield lambda jobs: _mapped(ray, actors, shared, jobs)
        finally:
            for actor in actors:
                ray.kill(actor)


class _Worker:
    """Runs the function, in an actor."""

    def __init__(self, setup: WorkerSetup) -> None:
        setup()
        self._function: Callable[[Any], Any] | None = None

    def ready(self) -> None:
        """Return once this actor has been started."""

    def run(self, shared: list[Any], job: Any) -> Any:
        """Run a job."""
        if self._function is None:
            (self._function,) = importlib.import_module("ray").get(shared)
        return self._function(job)


@dataclass(slots=True, eq=False)
class _Slot:
    """An actor, and how many jobs it was given that have not ended."""

    actor: Any
    jobs: int = 0


def _mapped(ray: Any, actors: list[Any], shared: list[Any], jobs: Sequence[Any]) -> Iterator[Any]:
    # An actor that the cluster has no room for yet is given nothing.
    starting = {actor.ready.remote(): _Slot(actor) for actor in actors}
    slots: list[_Slot] = []
    waits: dict[Any, _Slot] = {}
    results: deque[Any] = deque()
    given = 0
    try:
        while given < len(jobs) or results:
            while given < len(jobs) and len(results) < _AHEAD * len(slots):
                slot = min(slots, key=lambda each: each.jobs)
                if slot.jobs >= _QUEUED:
                    break
                results.append(slot.actor.run.remote(shared, jobs[given]))
                waits[results[-1]] = slot
                slot.jobs += 1
                given += 1
            ended = ray.wait([*starting, *waits], timeout=LOOK)[0]
            if not ended:
                check_alive(ray)
            for future in ended:
                if future in starting:
                    ray.get(future)
                    slots.append(starting.pop(future))
                else:
                    waits.pop(future).jobs -= 1
            while results and results[0] not in waits:
                yield ray.get(results.popleft())
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError as error:
        raise DataError(
            _(
                "an actor of Ray dies again and again: {reason}",
                reason=str(error).partition("\n")[0],
            )
        ) from None

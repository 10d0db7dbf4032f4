"""Map a function over jobs in order, in worker processes of this machine or on a Ray cluster."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.context import SpawnContext, SpawnProcess
from types import FrameType
from typing import Any, Protocol, TypeVar, cast

from cn_clip.data.ray_cluster import Cluster
from cn_clip.data.ray_map import ray_map
from cn_clip.errors import DataError
from cn_clip.processes import (
    GRACE,
    Interrupted,
    blocked_signals,
    end_with_parent,
    ignore_signals_in_worker,
)
from cn_clip.translation import _

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
_AHEAD = 4  # queued jobs per worker: workers never wait, few results do

Workers = int | Cluster
"""Worker processes of this machine, 0 for this process; or workers of a Ray cluster."""

Progress = Callable[[int, int | None], None]
"""Called with (done, total) items; ``total`` is None if unknown."""


def no_progress(done: int, total: int | None) -> None:
    """Report nothing."""


class Sliceable(Protocol):
    """A sequence or array that slicing returns parts of."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: slice, /) -> Any: ...


_Items = TypeVar("_Items", bound=Sliceable)


def chunked(items: _Items, size: int) -> list[_Items]:
    """Split into chunks of ``size`` items; the last one may be shorter."""
    return [items[at : at + size] for at in range(0, len(items), size)]


def at_most(workers: Workers, jobs: int) -> Workers:
    """Return the workers for a few jobs: no more processes than jobs."""
    return min(workers, jobs) if isinstance(workers, int) else workers


@contextmanager
def parallel_map(
    function: Callable[[_Job], _Result], workers: Workers
) -> Iterator[Callable[[Sequence[_Job]], Iterator[_Result]]]:
    """Yield a map of ``function`` over jobs; with 0 workers it runs in this process.

    The function is pickled once per worker, so it may carry a large object. Workers end when this
    process ends or the block raises; ``processes.Interrupted`` is raised inside the function.

    Raises:
        DataError: a worker died.
        UsageError, CNClipError: see ``ray_map``.
    """
    if isinstance(workers, Cluster):
        with ray_map(function, workers) as run_on_cluster:
            yield run_on_cluster
        return
    if workers <= 0:
        yield lambda jobs: map(function, jobs)
        return
    context = _Context()
    with blocked_signals():  # starts the process that tracks semaphores
        pool = ProcessPoolExecutor(workers, context, _init_worker, (function,))

    def run(jobs: Sequence[_Job]) -> Iterator[_Result]:
        waiting = deque(pool.submit(_run, job) for job in jobs[: _AHEAD * workers])
        for number in range(len(jobs)):
            result = waiting.popleft().result()
            if number + _AHEAD * workers < len(jobs):
                waiting.append(pool.submit(_run, jobs[number + _AHEAD * workers]))
            yield result

    try:
        yield run
    except BaseException as error:
        terminate(context.started)
        if isinstance(error, BrokenProcessPool):
            raise DataError(
                _("a worker died, possibly out of memory; use fewer with --workers")
                if workers > 1
                else _("a worker died, possibly out of memory; free some, and run this again")
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class _Context(SpawnContext):
    """Start workers, and keep a list of them."""

    def __init__(self) -> None:
        self.started: list[WorkerProcess] = []

    def Process(self, *args: Any, **options: Any) -> WorkerProcess:  # type: ignore[override]
        worker = WorkerProcess(*args, **options)
        self.started.append(worker)
        return worker


class WorkerProcess(SpawnProcess):
    """A worker that leaves signals to its parent, and ends with it."""

    def start(self) -> None:
        with blocked_signals():
            super().start()

    def run(self) -> None:
        ignore_signals_in_worker(_on_sigterm)
        end_with_parent(grace=GRACE)
        super().run()


def terminate(workers: Sequence[WorkerProcess]) -> None:
    """Terminate workers, and kill those that do not clean up in time."""
    alive = {worker.sentinel: worker for worker in workers if worker.pid is not None}
    for worker in alive.values():
        worker.terminate()
    deadline = time.monotonic() + GRACE
    while alive and (seconds := deadline - time.monotonic()) > 0:
        for sentinel in connection.wait(list(alive), seconds):
            del alive[cast(int, sentinel)]
    for worker in alive.values():
        worker.kill()


_function: Callable[[Any], Any]
_busy = False


def _init_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function


def _run(job: Any) -> Any:
    global _busy
    try:
        _busy = True
        return _function(job)
    except Interrupted as error:
        os._exit(error.code)
    finally:
        _busy = False


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    if not _busy:
        os._exit(128 + number)
    raise Interrupted(number)

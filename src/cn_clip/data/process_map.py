"""A function over many jobs by several processes, in order."""

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

from cn_clip.errors import DataError
from cn_clip.processes import (
    GRACE,
    Interrupted,
    end_with_parent,
    leave_signals_to_parent,
    signals_held_back,
)

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
_AHEAD = 4  # jobs a worker, so that none waits and few results do


class Sliceable(Protocol):
    """A sequence or an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: slice, /) -> Any: ...


_Items = TypeVar("_Items", bound=Sliceable)


def chunked(items: _Items, size: int) -> list[_Items]:
    """Return runs of so many items; the last one may be shorter."""
    return [items[at : at + size] for at in range(0, len(items), size)]


@contextmanager
def mapped(
    function: Callable[[_Job], _Result], workers: int
) -> Iterator[Callable[[Sequence[_Job]], Iterator[_Result]]]:
    """Yield a map of ``function`` over jobs; with no workers, it runs here.

    The function is sent to a worker once, when that starts: a method may carry a large object.
    Workers end with this process, whatever ends it, and are ended by any error here; a function
    that is ended meets ``processes.Interrupted``.

    Raises:
        DataError: a worker died.
    """
    if workers <= 0:
        yield lambda jobs: map(function, jobs)
        return
    context = _Context()
    with signals_held_back():  # the process that keeps track of semaphores starts here
        pool = ProcessPoolExecutor(workers, context, _start, (function,))

    def run(jobs: Sequence[_Job]) -> Iterator[_Result]:
        waiting = deque(pool.submit(_do, job) for job in jobs[: _AHEAD * workers])
        for number in range(len(jobs)):
            result = waiting.popleft().result()
            if number + _AHEAD * workers < len(jobs):
                waiting.append(pool.submit(_do, jobs[number + _AHEAD * workers]))
            yield result

    try:
        yield run
    except BaseException as error:
        _end(context.started)
        if isinstance(error, BrokenProcessPool):
            raise DataError(
                "a worker died, out of memory perhaps; take fewer with --workers"
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class _Context(SpawnContext):
    """Starts workers, and knows them."""

    def __init__(self) -> None:
        self.started: list[_Worker] = []

    def Process(self, *args: Any, **options: Any) -> _Worker:  # type: ignore[override]
        worker = _Worker(*args, **options)
        self.started.append(worker)
        return worker


class _Worker(SpawnProcess):
    def start(self) -> None:
        with signals_held_back():
            super().start()

    def run(self) -> None:
        leave_signals_to_parent(_terminated)
        end_with_parent(grace=GRACE)
        super().run()


def _end(workers: Sequence[_Worker]) -> None:
    """End workers, whatever they do; first they may remove what they have half written."""
    left = {worker.sentinel: worker for worker in workers if worker.pid is not None}
    for worker in left.values():
        worker.terminate()
    until = time.monotonic() + GRACE
    while left and (seconds := until - time.monotonic()) > 0:
        for sentinel in connection.wait(list(left), seconds):
            del left[cast(int, sentinel)]
    for worker in left.values():
        worker.kill()


_function: Callable[[Any], Any]
_busy = False


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function


def _do(job: Any) -> Any:
    global _busy
    try:
        _busy = True
        return _function(job)
    except Interrupted as error:
        os._exit(error.code)
    finally:
        _busy = False


def _terminated(number: int, frame: FrameType | None) -> None:
    if not _busy:
        os._exit(128 + number)
    raise Interrupted(number)

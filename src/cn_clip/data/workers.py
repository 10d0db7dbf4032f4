"""A function over many jobs by several processes, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol, TypeVar

from cn_clip.errors import DataError

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

    Raises:
        DataError: a worker died.
    """
    if workers <= 0:
        yield lambda jobs: map(function, jobs)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (function,))

    def run(jobs: Sequence[_Job]) -> Iterator[_Result]:
        waiting = deque(pool.submit(_do, job) for job in jobs[: _AHEAD * workers])
        for number in range(len(jobs)):
            result = waiting.popleft().result()
            if number + _AHEAD * workers < len(jobs):
                waiting.append(pool.submit(_do, jobs[number + _AHEAD * workers]))
            yield result

    try:
        yield run
    except BrokenProcessPool:
        raise DataError("a worker died, out of memory perhaps; take fewer with --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable[[Any], Any]


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function


def _do(job: Any) -> Any:
    return _function(job)

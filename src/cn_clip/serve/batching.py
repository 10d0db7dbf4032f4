"""Batches of concurrent requests: one queue for each tower, with bounds.

A batch starts as soon as the tower is free. Items that arrive meanwhile form the next batch, so
batches grow with the load, and a single request never waits for others. Only after a batch of
several items does the queue wait a few milliseconds, since the clients it has just answered are
about to ask again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cn_clip.serve.problems import overloaded, unavailable
from cn_clip.translation import _

Item = TypeVar("Item")
Result = TypeVar("Result")

LINGER = 0.002  # seconds to wait for more items under load
STALLED = 120.0  # seconds after which a running batch counts as stuck
CLOSE_SECONDS = 30.0
_SMOOTHING = 0.2  # of the measured throughput


@dataclass(eq=False, slots=True)
class _Group(Generic[Item, Result]):
    """The items of one request, and their results so far."""

    items: list[Item]
    costs: Sequence[int]
    future: asyncio.Future[None]
    results: list[Result | Exception | None]
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.items)

    def finish(self, index: int, result: Result | Exception) -> None:
        self.results[index] = result
        self.left -= 1
        if not self.left and not self.future.done():
            self.future.set_result(None)


class Batcher(Generic[Item, Result]):
    """Runs items of concurrent requests together, in one thread. Used from one event loop.

    Attributes:
        name: for metrics and messages.
        inside: cost of all admitted items: waiting, running or being prepared.
        bound: limit of ``inside``.
        batches, items: numbers that have run so far.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Result]],
        *,
        name: str,
        budget: int,
        max_items: int,
        bound: int,
        max_wait: float = math.inf,
        linger: float = LINGER,
        on_batch: Callable[[int, float], None] = lambda items, seconds: None,
    ) -> None:
        """Create a queue; ``start`` it in an event loop.

        Args:
            run: returns the result of each item of a batch; called in a thread. If it raises, each
                item is run alone, so that only those fail that are at fault.
            name: for metrics and messages.
            budget: of a batch: its largest cost times its number of items, the size of the padded
                array that the tower gets.
            max_items: of a batch.
            bound: cost of all admitted items, beyond which requests are refused.
            max_wait: estimated seconds until the admitted items are done, beyond which requests
                are refused too: a slow model has a shorter queue.
            linger: seconds to wait for more items under load.
            on_batch: called after each batch with its number of items and its seconds.
        """
        self._run, self.name, self.bound = run, name, bound
        self._budget, self._max_items, self._linger = budget, max_items, linger
        self._max_wait = max_wait
        self._on_batch = on_batch
        self._waiting: deque[tuple[_Group[Item, Result], int]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"cn_clip-{name}")
        self._task: asyncio.Task[None] | None = None
        self._last_items = 0
        self._running_since: float | None = None
        self._closed = False
        self._cost_per_second = 0.0
        self.inside = self.batches = self.items = 0

    def start(self) -> None:
        """Start to run batches in the current event loop."""
        self._task = asyncio.get_running_loop().create_task(self._work(), name=self.name)

    async def close(self) -> None:
        """Refuse new items, finish those that are inside, and end the thread.

        A batch that is stuck is not waited for.
        """
        self._closed = True
        self._arrived.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=CLOSE_SECONDS)
        self._thread.shutdown(wait=False)

    @property
    def healthy(self) -> bool:
        """Whether batches are being run: the queue works, and no batch is stuck."""
        if self._task is None or self._task.done():
            return False
        since = self._running_since
        return since is None or time.monotonic() - since < STALLED

    def wait_seconds(self) -> float:
        """Return the estimated seconds until the admitted items are done."""
        return self.inside / self._cost_per_second if self._cost_per_second else 1.0

    @contextmanager
    def admitted(self, cost: int) -> Iterator[None]:
        """Reserve room for items of a cost in total while they are prepared and run.

        Raises:
            RequestError: there is no room (429), or the server is ending (503).
        """
        if self._closed:
            raise unavailable(_("the server is ending, or changes its model; try again"))
        late = (self.inside + cost) > self._max_wait * (self._cost_per_second or math.inf)
        if self.inside and (late or self.inside + cost > self.bound):
            raise overloaded(self.wait_seconds())
        self.inside += cost
        try:
            yield
        finally:
            self.inside -= cost
            if self._closed:
                self._arrived.set()  # nothing more may come

    async def run(self, items: Sequence[Item], costs: Sequence[int]) -> list[Result | Exception]:
        """Return the result of each admitted item, or the exception that it raised.

        If the caller is cancelled, its items that have not started are dropped.
        """
        if not items:
            return []
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        group: _Group[Item, Result] = _Group(list(items), costs, future, [None] * len(items))
        self._waiting.extend((group, index) for index in range(len(items)))
        self._arrived.set()
        try:
            await future
        except asyncio.CancelledError:
            group.items.clear()  # releases images at once; _take() skips the entries
            raise
        return [result for result in group.results if result is not None]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._waiting:
                if self._closed and not self.inside:
                    return
                self._arrived.clear()
                await self._arrived.wait()
            if self._last_items > 1 and len(self._waiting) < self._last_items:
                await asyncio.sleep(self._linger)
            batch = self._take()
            if not batch:
                self._last_items = 0
                continue
            items = [group.items[index] for group, index in batch]
            start = self._running_since = time.monotonic()
            results = await loop.run_in_executor(self._thread, self._run_safely, items)
            self._running_since = None
            for (group, index), result in zip(batch, results, strict=True):
                group.finish(index, result)
            self._count(batch, time.monotonic() - start)

    def _take(self) -> list[tuple[_Group[Item, Result], int]]:
        """Remove the next batch from the queue."""
        batch: list[tuple[_Group[Item, Result], int]] = []
        largest = 0
        while self._waiting and len(batch) < self._max_items:
            group, index = self._waiting[0]
            if group.future.done():  # its client has left
                self._waiting.popleft()
                continue
            largest = max(largest, group.costs[index])
            if batch and largest * (len(batch) + 1) > self._budget:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _run_safely(self, items: list[Item]) -> Sequence[Result | Exception]:
        # A runtime may raise anything for an item; the queue and the other items must survive it.
        try:
            results = self._run(items)
            if len(results) != len(items):
                raise RuntimeError(f"{len(results)} results of {len(items)} items")
            return results
        except Exception as error:
            if len(items) == 1:
                return [error]
            return [self._run_safely([item])[0] for item in items]

    def _count(self, batch: Sequence[tuple[_Group[Item, Result], int]], seconds: float) -> None:
        self._last_items = len(batch)
        self.batches += 1
        self.items += len(batch)
        rate = sum(group.costs[index] for group, index in batch) / max(seconds, 1e-6)
        old = self._cost_per_second or rate
        self._cost_per_second = old + _SMOOTHING * (rate - old)
        self._on_batch(len(batch), seconds)

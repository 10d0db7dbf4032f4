"""Blocking work of requests in a few threads, with a bound."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

from cn_clip.serve.problems import overloaded, too_late

P = ParamSpec("P")
T = TypeVar("T")


class Gate:
    """Threads for blocking work. Used from one event loop.

    Attributes:
        inside: number of calls waiting or running.
    """

    def __init__(self, name: str, *, threads: int, bound: int, timeout: float) -> None:
        """Create the threads.

        Args:
            name: of the threads.
            threads: number of them.
            bound: calls inside, beyond which further ones are refused.
            timeout: seconds until a caller stops waiting.
        """
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"cn_clip-{name}")
        self._bound, self._timeout = bound, timeout
        self.inside = 0

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of a call.

        Raises:
            RequestError: there is no room (429), or no time (503).
        """
        if self.inside >= self._bound:
            raise overloaded(1)
        self.inside += 1
        loop = asyncio.get_running_loop()
        work = self._pool.submit(copy_context().run, partial(function, *args, **kwargs))

        def done(_unused: object) -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._leave)

        work.add_done_callback(done)
        try:
            async with asyncio.timeout(self._timeout):
                return await asyncio.wrap_future(work)
        except TimeoutError:
            raise too_late(self._timeout) from None

    def _leave(self) -> None:
        self.inside -= 1

    def close(self) -> None:
        """Release the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

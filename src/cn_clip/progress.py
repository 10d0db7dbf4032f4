"""The progress of a long call: a bar, or a function of the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

ProgressOption = bool | Callable[[int, int | None], object]
"""True shows a bar on stderr; a function is called with (done, total), total None if unknown."""


@contextmanager
def counted(
    option: ProgressOption, task: str, total: int | None
) -> Iterator[Callable[[int], None]]:
    """Yield a function that adds finished items to the progress."""
    if callable(option):
        yield _Counter(option, total)
    elif option:
        from rich.console import Console  # slow to import
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bars:
            number = bars.add_task(task, total=total)
            yield lambda count: bars.update(number, advance=count)
    else:
        yield lambda count: None


class _Counter:
    def __init__(self, report: Callable[[int, int | None], object], total: int | None) -> None:
        self._report, self._total, self._done = report, total, 0

    def __call__(self, count: int) -> None:
        self._done += count
        self._report(self._done, self._total)

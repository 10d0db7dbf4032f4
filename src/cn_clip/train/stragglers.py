"""Which process or data worker the others wait for.

All processes of a run wait for the slowest one in each step, so the step takes equally long on all
of them. What tells them apart is measured on each: the time it waits for data, and the time of its
own forward passes, in which it waits for no other. The times are compared every few steps.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from cn_clip import distributed
from cn_clip.data.loading.loader import PlannedLoader
from cn_clip.translation import _

_WINDOW = 10  # steps that are compared at once, or more
_SLOW = 1.5  # times the median of the others
_NOTICEABLE = 0.05  # fraction of a step
_REPEAT = 100  # windows after which the same process is named again
_PATIENCE = 30.0  # seconds of waiting for one batch before it is said; then twice that, ...

_Item = TypeVar("_Item")


class ProcessTimes(NamedTuple):
    """Seconds per step of one process, and seconds per batch of its slowest worker and the median
    of its other workers; ``worker`` is -1 if there are none to compare."""

    step: float
    data: float
    longest_data: float
    forward: float
    worker: float
    worker_seconds: float
    other_workers: float


@dataclass(slots=True)
class StepTimes:
    """The times of this process since the last comparison.

    Args:
        device: of the model; on CUDA the forward passes are timed by events, without a stop.
    """

    device: torch.device
    waiting_since: float | None = None  # while a batch is waited for
    _data: list[float] = field(default_factory=list)
    _forward: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    _began: Any = None
    _since: float = field(default_factory=time.monotonic)
    _windows: int = 0
    _named: dict[tuple[int, str], int] = field(default_factory=dict)

    def watch(self, module: nn.Module) -> None:
        """Time the forward passes of a module."""
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def waits(self, batches: Iterable[_Item]) -> Iterator[_Item]:
        """Yield the batches, and time how long each is waited for."""
        iterator = iter(batches)
        while True:
            start = self.waiting_since = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.waiting_since = None
            self._data.append(time.monotonic() - start)
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the context out of the steps."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started

    def compare(self, loader: PlannedLoader) -> list[str]:
        """Return a sentence for each slow process, on the main process; clear the times.

        All processes call this after the same steps. It returns nothing until there are enough.
        """
        if len(self._data) < _WINDOW:
            return []
        own = self._times(loader)
        row = torch.tensor([own], dtype=torch.float32, device=self.device)
        rows = distributed.all_gather_rows(row, counts=[1] * distributed.world_size())
        self._data, self._forward, self._events = [], 0.0, []
        self._since, self._windows = time.monotonic(), self._windows + 1
        if self._windows == 1:  # the first steps fill queues and compile
            return []
        messages = []
        for rank, cause, message in slow_processes([ProcessTimes(*row) for row in rows.tolist()]):
            if self._windows >= self._named.get((rank, cause), 0):
                self._named[rank, cause] = self._windows + _REPEAT
                messages.append(message)
        return messages

    def _times(self, loader: PlannedLoader) -> ProcessTimes:
        steps = len(self._data)
        forward = self._forward
        if self._events:
            self._events[-1][1].synchronize()
            forward += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        return ProcessTimes(
            (time.monotonic() - self._since) / steps,
            sum(self._data) / steps,
            max(self._data),
            forward / steps,
            *slowest_worker(loader),
        )

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._began = self._mark()

    def _end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        began, end = self._began, self._mark()
        if isinstance(began, float):
            self._forward += end - began
        else:
            self._events.append((began, end))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def slowest_worker(loader: PlannedLoader) -> tuple[int, float, float]:
    """Return the number of a loader's slowest worker, its median seconds per batch, and the median
    of the others; -1 and zeros with fewer than two workers."""
    medians = {worker: statistics.median(s) for worker, s in loader.worker_seconds.items()}
    if len(medians) < 2:
        return -1, 0.0, 0.0
    worker = max(medians, key=lambda number: medians[number])
    return worker, medians.pop(worker), statistics.median(medians.values())


def slow_processes(times: Sequence[ProcessTimes]) -> Iterator[tuple[int, str, str]]:
    """Yield rank, cause and a sentence for each process that the others wait for.

    A single process is named only if one of its workers is slow.
    """
    for rank, own in enumerate(times):
        others = [other for number, other in enumerate(times) if number != rank]
        data = _median([other.data for other in others])
        if _is_slow(own.data, data, own.step):
            worker = _worker_sentence(own)
            if others or worker:
                yield rank, "data", _data_sentence(rank, own, data if others else None) + worker
        forward = _median([other.forward for other in others])
        if others and _is_slow(own.forward, forward, own.step):
            yield rank, "forward", _forward_sentence(rank, own, forward)


def _is_slow(seconds: float, median: float, step: float) -> bool:
    return seconds > _SLOW * median and seconds - median > _NOTICEABLE * step


def _data_sentence(rank: int, own: ProcessTimes, median: float | None) -> str:
    """``median`` is of the other processes; None without any."""
    if median is None:
        return _("a step waits {seconds:.2f} s for data", seconds=own.data)
    return _(
        "process {rank} waits {seconds:.2f} s a step for data (at most {longest:.2f} s), the "
        "median of the others is {median:.2f} s",
        rank=rank,
        seconds=own.data,
        longest=own.longest_data,
        median=median,
    )


def _forward_sentence(rank: int, own: ProcessTimes, median: float) -> str:
    return _(
        "process {rank} is slow: its forward pass takes {seconds:.2f} s, {times:.1f} times the "
        "median of the others; see what else its GPU or its cores do",
        rank=rank,
        seconds=own.forward,
        times=own.forward / max(median, 1e-9),
    )


def _worker_sentence(times: ProcessTimes) -> str:
    """Return what a message adds about a slow worker; empty if none is slow."""
    if times.worker < 0 or times.worker_seconds <= _SLOW * times.other_workers:
        return ""
    return _(
        "; its worker {worker} takes {seconds:.2f} s a batch, the others {median:.2f} s",
        worker=int(times.worker),
        seconds=times.worker_seconds,
        median=times.other_workers,
    )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


@contextmanager
def long_waits_reported(
    times: StepTimes,
    loader: PlannedLoader,
    report: Callable[[str], None],
    *,
    patience: float = _PATIENCE,
) -> Iterator[None]:
    """Report a batch that does not come, from a thread: after ``patience`` seconds, and again
    whenever the time has doubled."""
    ended = threading.Event()

    def watch() -> None:
        limit, since = patience, 0.0
        while not ended.wait(patience / 10):
            current = times.waiting_since
            if current is None:
                continue
            if current != since:
                limit, since = patience, current
            if time.monotonic() - current > limit:
                limit *= 2
                report(_waiting_sentence(loader, time.monotonic() - current))

    thread = threading.Thread(target=watch, name="long waits for data", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _waiting_sentence(loader: PlannedLoader, seconds: float) -> str:
    rank = distributed.rank()
    if loader.next_worker is None:
        return _(
            "process {rank} has waited {seconds:.0f} s for a batch, which it reads itself",
            rank=rank,
            seconds=seconds,
        )
    worker, pid = loader.next_worker
    return _(
        "process {rank} has waited {seconds:.0f} s for a batch of its worker {worker} (process id "
        "{pid}); see whether its disk or its network answers",
        rank=rank,
        seconds=seconds,
        worker=worker,
        pid=pid,
    )

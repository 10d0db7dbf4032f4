"""Shards in processes of this machine, each with its own model and its own CPUs or GPU."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

from cn_clip.bulk.engines.base import Outcome, Task, Waiting, attempt
from cn_clip.data.process_map import WorkerProcess, terminate
from cn_clip.errors import CNClipError
from cn_clip.processes import GRACE, Interrupted, ignore_signals_in_worker, usable_cpus
from cn_clip.translation import _

_CPUS_PER_WORKER = 4  # more threads hardly help one process
_POLL = 0.2  # seconds between looks at shards of other processes
_MAX_DEATHS = 10  # of a worker in a row


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """Processes of this machine; with None one per GPU, or per four CPUs."""

    workers: int | None = None

    def __call__(self, task: Task, shards: Iterable[int]) -> Iterator[Outcome]:
        """Yield the outcomes of shards.

        Raises:
            CNClipError: no shard can succeed, or workers die at their start.
        """
        if self.workers == 0:
            yield from _in_this_process(task, Waiting(shards, task.retries))
            return
        slots = _slots(self.workers, task.device)
        pool = _Pool(task, slots)
        try:
            yield from pool.run(Waiting(shards, task.retries))
        finally:
            pool.stop()


@dataclass(frozen=True, slots=True)
class Slot:
    """What a worker may use: CPUs, or all of them, and a device, or the planned one."""

    cpus: frozenset[int] | None
    device: str | None


@dataclass(slots=True)
class _Worker:
    process: WorkerProcess
    pipe: Connection
    slot: Slot
    shard: int | None = None
    deaths: int = 0


def _in_this_process(task: Task, waiting: Waiting) -> Iterator[Outcome]:
    while True:
        number = waiting.next()
        if number is None:
            if waiting.is_empty:
                return
            time.sleep(_POLL)
            continue
        outcome = attempt(task, number)
        if waiting.settle(outcome):
            yield outcome


def _slots(workers: int | None, device: str) -> list[Slot]:
    """Divide this machine among workers."""
    gpus = _gpu_count() if device in ("auto", "cuda") else 0
    if gpus:
        return [Slot(None, f"cuda:{n % gpus}") for n in range(workers or gpus)]
    count = workers or max(1, usable_cpus() // _CPUS_PER_WORKER)
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if count > len(cpus):
        return [Slot(None, None)] * count
    return [Slot(frozenset(cpus[n::count]), None) for n in range(count)]


def _gpu_count() -> int:
    if sys.platform == "linux" and not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0  # without torch, whose 200 MB the driver does not need
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


class _Pool:
    """Workers that are started again when they die."""

    def __init__(self, task: Task, slots: list[Slot]) -> None:
        self._task = task
        self._workers = [self._start(slot) for slot in slots]

    def run(self, waiting: Waiting) -> Iterator[Outcome]:
        """Give every idle worker a shard, until none is left."""
        while True:
            for worker in self._workers:
                if worker.shard is None and (number := waiting.next()) is not None:
                    self._give(worker, number)
            busy = [worker for worker in self._workers if worker.shard is not None]
            if not busy and waiting.is_empty:
                return
            ready = connection.wait([worker.pipe for worker in busy], _POLL)
            for worker in busy:
                if worker.pipe in ready:
                    outcome = self._receive(worker)
                    if waiting.settle(outcome):
                        yield outcome

    def stop(self) -> None:
        """End all workers; shards that are not done have to be computed again."""
        for worker in self._workers:
            worker.pipe.close()  # ends those that wait for a shard
        terminate([worker.process for worker in self._workers if worker.shard is not None])
        for worker in self._workers:
            worker.process.join(GRACE)
        terminate([worker.process for worker in self._workers if worker.process.is_alive()])

    def _start(self, slot: Slot) -> _Worker:
        ours, theirs = get_context("spawn").Pipe()
        process = WorkerProcess(target=_serve, args=(theirs, self._task, slot), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, slot)

    def _give(self, worker: _Worker, number: int) -> None:
        worker.shard = number
        with suppress(OSError):  # it died while idle: reading from it reports that
            worker.pipe.send(number)

    def _receive(self, worker: _Worker) -> Outcome:
        """Return the outcome of a worker's shard; start another worker if it died."""
        assert worker.shard is not None
        number, worker.shard = worker.shard, None
        try:
            outcome: Outcome = worker.pipe.recv()
            worker.deaths = 0
            return outcome
        except (EOFError, OSError):
            pass
        worker.process.join()
        deaths = worker.deaths + 1
        if deaths > _MAX_DEATHS:
            raise CNClipError(
                _(
                    "a worker died {count} times in a row (exit code {code}), possibly out of "
                    "memory; use fewer with --workers",
                    count=deaths,
                    code=worker.process.exitcode,
                )
            )
        new = self._start(worker.slot)
        worker.process, worker.pipe, worker.deaths = new.process, new.pipe, deaths
        return Outcome(number, error=_("its worker died, possibly out of memory"))


def _serve(pipe: Connection, task: Task, slot: Slot) -> None:
    """Compute shards in a worker process, until the pipe is closed."""
    ignore_signals_in_worker(_interrupt)
    try:
        _confine(slot)
        while True:
            pipe.send(attempt(task, pipe.recv(), slot.device))
    except (EOFError, OSError):
        return
    except Interrupted as error:
        os._exit(error.code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def _confine(slot: Slot) -> None:
    """Use no more than the CPUs of a slot, whatever libraries run in this process."""
    if slot.cpus is None or not hasattr(os, "sched_setaffinity"):
        return
    os.sched_setaffinity(0, slot.cpus)
    os.environ["OMP_NUM_THREADS"] = str(len(slot.cpus))  # torch is imported with the first shard

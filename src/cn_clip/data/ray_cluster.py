"""Workers on a Ray cluster: how many, what each may use, and the connection to the cluster."""

from __future__ import annotations

import importlib
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cn_clip.errors import CNClipError, UsageError
from cn_clip.install import install_command
from cn_clip.processes import limit_cpus
from cn_clip.translation import _, languages, use_languages

LOOK = 10.0  # seconds without an answer, after which ``check_alive`` is asked
_STARTS = 3  # of Ray on this machine, which gives up after 30 seconds


@dataclass(frozen=True, slots=True)
class Cluster:
    """Workers of a Ray cluster.

    Attributes:
        workers: their number; None takes as many as the cluster has room for now.
        cpus: of each worker.
        gpus: of each worker; 0.25 shares a GPU among four.
        address: of the cluster; None takes RAY_ADDRESS, or starts Ray on this machine.
    """

    workers: int | None = None
    cpus: float = 1
    gpus: float = 0
    address: str | None = None

    @contextmanager
    def connected(self) -> Iterator[Any]:
        """Connect this process, unless it is; yield the module ``ray``.

        Raises:
            UsageError: Ray is not installed.
            CNClipError: the cluster cannot be reached.
        """
        ray = _ray()
        if ray.is_initialized():
            yield ray
            return
        self._connect(ray)
        try:
            with _nothing_printed():
                yield ray
        finally:
            ray.shutdown()

    def _connect(self, ray: Any) -> None:
        for left in reversed(range(_STARTS)):
            try:
                with _own_sigterm():
                    ray.init(
                        address=self.address, logging_level="ERROR", log_to_driver=False,
                        include_dashboard=False if self.address is None else None,
                    )  # fmt: skip
                return
            except Exception as error:  # of any kind: a bare one if a busy machine takes too long
                ray.shutdown()
                if left and type(error) is Exception:
                    continue
                raise self._refused(str(error).partition("\n")[0]) from None

    def _refused(self, reason: str) -> CNClipError:
        address = self.address or os.environ.get("RAY_ADDRESS")
        if address is None:
            return CNClipError(_("Ray cannot be started on this machine: {reason}", reason=reason))
        return CNClipError(
            _("the Ray cluster {address} cannot be used: {reason}", address=address, reason=reason)
        )

    def count(self, ray: Any) -> int:
        """Return how many workers to start."""
        if self.workers:
            return self.workers
        free = ray.available_resources()
        by_cpu = free.get("CPU", 0) / self.cpus if self.cpus else math.inf
        by_gpu = free.get("GPU", 0) / self.gpus if self.gpus else math.inf
        room = min(by_cpu, by_gpu)
        return max(1, int(room)) if room != math.inf else 1

    def remote_class(self, ray: Any, kind: type, *, retries: int) -> Any:
        """Return a class whose instances are actors, started again when they die.

        Args:
            ray: the module.
            kind: the class.
            retries: how often a call is repeated whose actor died.
        """
        return ray.remote(
            num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=-1, max_task_retries=retries
        )(kind)

    @property
    def setup(self) -> WorkerSetup:
        """What each worker calls first."""
        # The threads of one with a GPU feed it, so that it takes the CPUs that are free.
        own = math.ceil(self.cpus) if self.cpus and not self.gpus else None
        return WorkerSetup(tuple(languages()), own)


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker shares with the process that started it: its language, and its CPUs."""

    languages: tuple[str, ...]
    cpus: int | None

    def __call__(self) -> None:
        use_languages(self.languages)
        if self.cpus is not None:
            limit_cpus(self.cpus)


def check_alive(ray: Any) -> None:
    """Raise a ``CNClipError`` if the cluster has no machine any more: waiting would not end."""
    try:
        alive = any(node["Alive"] for node in ray.nodes())
    except ray.exceptions.RayError:  # its head is gone
        alive = False
    if not alive:
        raise CNClipError(
            _("Ray has ended; what is finished stays. Run the same command again to go on")
        )


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM: Ray's ends this process without cleaning up, or a word."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where Ray sets none
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """Keep Ray from printing to stdout that a worker died: that is the place of --json."""
    worker: Any = importlib.import_module("ray._private.worker")
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = True


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise UsageError(
            _("--engine ray needs Ray: {command}", command=install_command("ray"))
        ) from None

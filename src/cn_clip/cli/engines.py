"""``--engine`` and its options: what does the work of a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from cn_clip.cli.show import Workers
from cn_clip.errors import UsageError
from cn_clip.processes import usable_cpus
from cn_clip.translation import _

if TYPE_CHECKING:
    from cn_clip.data.process_map import Workers as MapWorkers
    from cn_clip.data.ray_cluster import Cluster

EngineName = Literal["local", "ray"]
Share = Annotated[float, Parameter(validator=Number(gte=0))]


@Parameter(name="*")
@dataclass(frozen=True)
class Engine:
    """What does the work of a command that maps a function over many jobs.

    Parameters
    ----------
    engine
        local: processes of this machine. ray: a Ray cluster, or Ray on this machine.
    workers
        Number of worker processes. local: by default one per CPU; 0 uses the main process. ray: by
        default as many as there is room for.
    cpus
        Of each Ray worker.
    address
        Of the Ray cluster, by default RAY_ADDRESS.
    """

    engine: EngineName = "local"
    workers: Workers = None
    cpus: Share = 1
    address: str | None = None

    @property
    def processes(self) -> int:
        """How many processes of this machine do what no cluster does."""
        return usable_cpus() if self.workers is None or self.engine == "ray" else self.workers

    @contextmanager
    def opened(self) -> Iterator[MapWorkers]:
        """Yield the workers; a cluster is connected once.

        Raises:
            UsageError: options of another engine, or Ray is not installed.
            CNClipError: the cluster cannot be reached.
        """
        if self.engine == "local":
            check_local(self.cpus, 0, self.address)
            yield self.processes
            return
        cluster = cluster_of(self.workers, self.cpus, 0, self.address)
        with cluster.connected():
            yield cluster


DEFAULT_ENGINE = Engine()


def check_local(cpus: float, gpus: float, address: str | None) -> None:
    """Refuse options that are of no local engine.

    Raises:
        UsageError: one is given.
    """
    if gpus or address is not None or cpus != 1:
        raise UsageError(_("--cpus, --gpus and --address are for --engine ray"))


def cluster_of(workers: int | None, cpus: float, gpus: float, address: str | None) -> Cluster:
    """Return the workers of a Ray cluster; 0 workers are as many as there is room for."""
    from cn_clip.data.ray_cluster import Cluster

    return Cluster(workers or None, cpus, gpus, address)

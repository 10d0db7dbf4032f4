"""What one process of several says to the others; alone, every function is the identity.

Tensors stay on their device: ``gloo`` carries those of the CPU, ``nccl`` those of a GPU.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from cn_clip.errors import CNClipError, UsageError
from cn_clip.processes import terminate_with_launcher

_PATIENCE = timedelta(hours=2)  # others wait while one writes or looks through the data
_T = TypeVar("_T")
_LAUNCHED = "TORCHELASTIC_RUN_ID"
_SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def start(device_type: str) -> Iterator[None]:
    """Join the other processes, if torchrun started several, and leave them at the end.

    ``device_type`` is ``cuda`` or ``cpu``; a process of ``cuda`` takes the GPU of its
    ``LOCAL_RANK`` as current device. Without ``WORLD_SIZE``, or at 1, nothing is started.

    Raises:
        UsageError: ``WORLD_SIZE`` is set, but not what else torchrun sets.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        yield
        return
    if missing := [name for name in _SET_BY_TORCHRUN if name not in os.environ]:
        raise UsageError(
            f"WORLD_SIZE is {count}, but {', '.join(missing)} not set; "
            "start several processes with torchrun, or unset WORLD_SIZE"
        )
    if _LAUNCHED in os.environ:  # torchrun ends its processes, unless it is killed itself
        terminate_with_launcher()
    device = None
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device else "gloo"
    dist.init_process_group(backend, device_id=device, timeout=_PATIENCE)
    yield
    # Not after an error: it waits for the others, who wait for this process in something else.
    # Its exit code makes torchrun end them.
    gc.collect()  # models in shares hold on to the group in circles, and must go before it
    dist.barrier()
    dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _joined() else 1


def is_main() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return rank() == 0


def row_counts(x: Tensor) -> list[int]:
    """Return the number of rows that each rank holds."""
    if world_size() == 1:
        return [len(x)]
    counts = _gathered(torch.tensor([len(x)], device=x.device))
    return cast(list[int], torch.cat(counts).tolist())


def all_gather_rows(x: Tensor, *, counts: list[int] | None = None) -> Tensor:
    """Return the rows (N, ...) of all ranks in their order, out of this one's (b, ...).

    The rank's ``b`` may differ, and be 0. ``counts`` saves asking for them, if ``row_counts``
    was called before. No gradient flows through.
    """
    x = x.detach()
    if world_size() == 1:
        return x
    counts = counts or row_counts(x)
    most = max(counts)
    if most == 0:
        return x
    # Collectives take equal shapes: every rank sends as many rows as the one with most.
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    return torch.cat([block[:n] for block, n in zip(_gathered(padded), counts, strict=True)])


def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum of all ranks' tensors of one shape."""
    return _reduced(x, "sum")


def all_reduce_max(x: Tensor) -> Tensor:
    """Return the element-wise maximum of all ranks' tensors of one shape."""
    return _reduced(x, "max")


def broadcast_object(value: _T) -> _T:
    """Return the main process' value, which is pickled; the other ranks' is ignored."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather_object(value: _T) -> list[_T]:
    """Return the values of all ranks in their order; they are pickled."""
    if world_size() == 1:
        return [value]
    values = cast(list[_T], [None] * world_size())
    dist.all_gather_object(values, value)
    return values


def on_main(work: Callable[[], _T]) -> _T:
    """Return what ``work`` returns in the main process, on every rank; or raise there what it does.

    So that a rank whose main process has failed does not wait for it. Errors of this package only:
    of others the process ends, and torchrun ends the rest.
    """
    answer: tuple[_T | None, CNClipError | None] = (None, None)
    if is_main():
        try:
            answer = work(), None
        except CNClipError as error:
            answer = None, error
    value, failed = broadcast_object(answer)
    if failed is not None:
        raise failed
    return cast(_T, value)


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gathered(x: Tensor) -> list[Tensor]:
    """Return the tensors of all ranks, of one shape."""
    # Not all_gather_into_tensor: its name differs between the versions of torch that we support.
    blocks = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(blocks, x)
    return blocks


def _reduced(x: Tensor, operation: str) -> Tensor:
    x = x.detach()
    if world_size() == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
    return x

"""Communication between processes; with one process, every function is the identity.

Tensors stay on their device: CPU tensors use ``gloo``, GPU tensors ``nccl``.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from cn_clip.errors import CNClipError, UsageError
from cn_clip.processes import terminate_with_launcher
from cn_clip.translation import _

_TIMEOUT = timedelta(hours=2)  # one process may write or scan the data while others wait
_T = TypeVar("_T")
_TORCHRUN_ID = "TORCHELASTIC_RUN_ID"
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_NCCL_CAUSE = "Last error:"
_MAX_REASON = 110  # characters
_SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def start(device_type: str) -> Iterator[None]:
    """Initialise the process group if torchrun started several processes; destroy it at the end.

    ``device_type`` is ``cuda`` or ``cpu``; with ``cuda`` the current device is the GPU of
    ``LOCAL_RANK``. If ``WORLD_SIZE`` is unset or 1, this does nothing.

    Raises:
        UsageError: ``WORLD_SIZE`` is set, but other variables of torchrun are not.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        yield
        return
    if missing := [name for name in _SET_BY_TORCHRUN if name not in os.environ]:
        raise UsageError(
            _(
                "WORLD_SIZE is {count}, but {missing} not set; start several processes with "
                "torchrun, or unset WORLD_SIZE",
                count=count,
                missing=", ".join(missing),
            )
        )
    if _TORCHRUN_ID in os.environ:  # torchrun ends its processes, but not if it is killed
        terminate_with_launcher()
    device = None
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device else "gloo"
    with _connection_errors_named(_not_connected):
        dist.init_process_group(backend, device_id=device, timeout=_TIMEOUT, **_store_of_attempt())
    with _connection_errors_named(_disconnected):
        yield
    # Not after an error: the barrier would wait for processes that wait elsewhere. The exit code
    # makes torchrun end them.
    gc.collect()  # sharded models have reference cycles to the group, and must be freed first
    dist.barrier()
    dist.destroy_process_group()


def _store_of_attempt() -> dict[str, Any]:
    """Return the store of this attempt, as arguments of ``init_process_group``.

    torchrun keeps its store when it starts the processes again, and with it the addresses of those
    that died. On several nodes, the attempts may be counted differently.
    """
    count, local = os.environ["WORLD_SIZE"], os.environ.get("LOCAL_WORLD_SIZE")
    if os.environ.get(_AGENT_STORE) != "True" or local != count:
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, int(count), is_master=False, timeout=_TIMEOUT
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {
        "store": dist.PrefixStore(f"attempt {attempt}", store),  # type: ignore[attr-defined]
        "rank": int(os.environ["RANK"]),
        "world_size": int(count),
    }


@contextmanager
def _connection_errors_named(message: Callable[[str], str]) -> Iterator[None]:
    """Turn the errors about communication into the sentence that ``message`` makes of a reason."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise CNClipError(message(_reason_of(error))) from error


def _not_connected(reason: str) -> str:
    return _(
        "the processes of the run cannot connect ({reason}); each must reach MASTER_ADDR, and have "
        "a GPU of its own if it has any",
        reason=reason,
    )


def _disconnected(reason: str) -> str:
    return _(
        "a process of the run can no longer be reached ({reason}); if it ended, its message says "
        "why. With torchrun --max-restarts=10 and --resume auto, all start again from the last "
        "state",
        reason=reason,
    )


def _reason_of(error: RuntimeError) -> str:
    """Return what an error of gloo or NCCL says, without places in source code."""
    lines = [re.sub(r"^\[[^\]]*:\d+\]\s*", "", line).strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line] or [type(error).__name__]
    # NCCL: the class of the error first, and its cause below this heading.
    after = lines[lines.index(_NCCL_CAUSE) + 1 :] if _NCCL_CAUSE in lines else []
    return [*after, *lines][0][:_MAX_REASON]


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if _initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _initialized() else 1


def is_main() -> bool:
    """Return whether this is the process that writes and prints, rank 0."""
    return rank() == 0


def row_counts(x: Tensor) -> list[int]:
    """Return the number of rows of each rank."""
    if world_size() == 1:
        return [len(x)]
    counts = _gathered(torch.tensor([len(x)], device=x.device))
    return cast(list[int], torch.cat(counts).tolist())


def all_gather_rows(x: Tensor, *, counts: list[int] | None = None) -> Tensor:
    """Gather the rows (b, ...) of all ranks to (N, ...), in the order of ranks, without gradient.

    ``b`` may differ between ranks and be 0. ``counts`` is the result of ``row_counts``, if known.
    """
    x = x.detach()
    if world_size() == 1:
        return x
    counts = counts or row_counts(x)
    longest = max(counts)
    if longest == 0:
        return x
    # Collectives need equal shapes, so every rank pads its rows.
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    return torch.cat([block[:n] for block, n in zip(_gathered(padded), counts, strict=True)])


def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum over ranks of tensors of the same shape."""
    return _reduced(x, "sum")


def all_reduce_max(x: Tensor) -> Tensor:
    """Return the element-wise maximum over ranks of tensors of the same shape."""
    return _reduced(x, "max")


def new_group() -> dist.ProcessGroup | None:
    """Create another group of all processes, for a thread of its own; None with one process.

    In one group, all ranks must communicate in the same order, which threads do not keep.
    """
    return dist.new_group(backend="gloo", timeout=_TIMEOUT) if world_size() > 1 else None


def broadcast_object(value: _T, group: dist.ProcessGroup | None = None) -> _T:
    """Return the value of the main process, by pickle; those of other ranks are ignored."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def all_gather_object(value: _T) -> list[_T]:
    """Return the values of all ranks in order, by pickle."""
    if world_size() == 1:
        return [value]
    values = cast(list[_T], [None] * world_size())
    dist.all_gather_object(values, value)
    return values


def on_main(work: Callable[[], _T]) -> _T:
    """Run ``work`` in the main process; on all ranks, return its result or raise its error.

    So no rank waits for a main process that failed. This holds for a ``CNClipError``; any other
    error ends the process, and torchrun ends the others.
    """
    result: tuple[_T | None, CNClipError | None] = (None, None)
    if is_main():
        try:
            result = work(), None
        except CNClipError as error:
            result = None, error
    value, error_of_main = broadcast_object(result)
    if error_of_main is not None:
        raise error_of_main
    return cast(_T, value)


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier(group)


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gathered(x: Tensor) -> list[Tensor]:
    """Return the tensors of all ranks; they have the same shape."""
    # Not all_gather_into_tensor, whose name differs between supported versions of torch.
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

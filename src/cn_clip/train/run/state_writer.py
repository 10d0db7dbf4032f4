"""States saved in the background, while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from cn_clip import distributed
from cn_clip.train.run.checkpoint import Progress, save_state


class StateWriter:
    """Saves the states of a run, one at a time. Every process has one, and calls it alike."""

    def __init__(self, folder: Path, *, keep: int, background: bool) -> None:
        """Create a writer.

        Args:
            folder: of the run.
            keep: number of states kept.
            background: copy the tensors and let a thread write them. The copies are in the memory
                of the CPU; those of sharded tensors stay on their device.
        """
        self._folder, self._keep = folder, keep
        self._group = distributed.new_group() if background else None
        self._thread = ThreadPoolExecutor(1, "cn_clip-state") if background else None
        self._running: tuple[Progress, Future[Path]] | None = None

    def save(self, progress: Progress, tensors: Mapping[str, Any]) -> None:
        """Save a state, or begin to; the one before must have been waited for.

        Raises:
            CheckpointError: it cannot be written; in the background, ``wait`` raises this.
        """
        assert self._running is None
        progress = copy.deepcopy(progress)
        done: Future[Path]
        if self._thread is None:
            done = Future()
            done.set_result(save_state(self._folder, progress, tensors, keep=self._keep))
        else:
            done = self._thread.submit(
                save_state,
                self._folder,
                progress,
                _copied(tensors),
                keep=self._keep,
                group=self._group,
            )
        self._running = progress, done

    def wait(self) -> Progress | None:
        """Wait until the last state is complete, and return it; None if that was done before.

        Raises:
            CheckpointError: it cannot be written; earlier states are unchanged.
        """
        if self._running is None:
            return None
        (progress, done), self._running = self._running, None
        done.result()
        return progress

    def close(self) -> None:
        """Let the state that is being written become complete, and end the thread."""
        if self._thread is not None:
            self._thread.shutdown()


def _copied(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _copied(value)
        if isinstance(value, Mapping)
        else value.detach().clone()
        if isinstance(value, DTensor)
        else value.detach().to("cpu", copy=True)
        if isinstance(value, Tensor)
        else copy.deepcopy(value)
        for name, value in tensors.items()
    }

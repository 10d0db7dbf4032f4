"""What is logged about steps: loss, learning rate, throughput, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from cn_clip import distributed
from cn_clip.train.run.checkpoint import Progress
from cn_clip.train.run.events import StepEvent
from cn_clip.train.stage import Run, Training
from cn_clip.translation import _


@dataclass(frozen=True, slots=True)
class StepMetrics:
    loss: float
    lr: float
    gradient_norm: float


@dataclass(slots=True)
class Window:
    """Losses and pairs since the last logged step."""

    losses: list[float] = field(default_factory=list)
    pairs: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, loss: float, pairs: int) -> None:
        self.losses.append(loss)
        self.pairs += pairs

    @property
    def mean_loss(self) -> float:
        return sum(self.losses) / max(1, len(self.losses))

    @property
    def pairs_per_second(self) -> float:
        return self.pairs / max(1e-9, time.monotonic() - self.since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the context out."""
        started = time.monotonic()
        yield
        self.since += time.monotonic() - started

    def clear(self) -> None:
        self.losses, self.pairs, self.since = [], 0, time.monotonic()


def log_step(
    run: Run, training: Training, progress: Progress, metrics: StepMetrics, window: Window
) -> None:
    """Report progress; every ``output.log_every`` steps, log the step and clear the window."""
    stage = training.stage
    run.log.tick(_("stage {name}", name=stage.name), progress.step, training.steps)
    if progress.step % run.recipe.output.log_every and progress.step not in (1, training.steps):
        return
    run.log.record(
        StepEvent(
            progress.total,
            stage=stage.name,
            step=progress.step,
            loss=metrics.loss,
            mean_loss=window.mean_loss,
            lr=metrics.lr,
            logit_scale=float(training.model.logit_scale.detach().exp()),
            pairs_per_second=round(window.pairs_per_second * distributed.world_size(), 1),
            skipped=training.loader.skipped,
            gradient_norm=metrics.gradient_norm,
            memory_mb=_memory_mb(run.device),
        )
    )
    window.clear()


def _memory_mb(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) >> 20 if device.type == "cuda" else None

"""The events of a run: the lines of ``log.jsonl``, as typed values.

Field names and their order are those of the file. ``total`` counts the steps of all stages.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

FINAL = "final"  # the ``stage`` of the score of the final weights


def interpolated(stage: str) -> str:
    """Return the ``stage`` of the score of a stage's interpolated weights."""
    return f"{stage}, mixed"


@dataclass(frozen=True, slots=True)
class RunEvent:
    """An event; ``kind`` names its type in the file."""

    kind: ClassVar[str]
    total: int

    def values(self) -> dict[str, Any]:
        """Return the event's own fields, without ``total``."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "total"}


@dataclass(frozen=True, slots=True)
class StartEvent(RunEvent):
    """A new run."""

    kind = "start"
    recipe: str
    model: str
    parameters: int
    device: str
    processes: int
    pairs: int
    origins: list[str]


@dataclass(frozen=True, slots=True)
class ResumedEvent(RunEvent):
    """A run resumed from a state."""

    kind = "resumed"
    step: int
    state: str


@dataclass(frozen=True, slots=True)
class StageEvent(RunEvent):
    """A stage, as it starts or resumes; ``rate`` is the peak learning rate, ``learns`` the number
    of trainable parameters."""

    kind = "stage"
    stage: str
    number: int
    step: int
    steps: int
    rate: float
    warmup: int
    batch: int
    learns: int
    batch_norm: str | None


@dataclass(frozen=True, slots=True)
class StepEvent(RunEvent):
    """A training step; ``rate`` is its learning rate, ``skipped`` the unreadable pairs so far."""

    kind = "step"
    stage: str
    step: int
    loss: float
    mean_loss: float
    rate: float
    logit_scale: float
    pairs_per_second: float
    skipped: int
    gradient_norm: float
    memory_mb: int | None = None  # on CUDA only

    def values(self) -> dict[str, Any]:
        values = RunEvent.values(self)
        if self.memory_mb is None:
            del values["memory_mb"]
        return values


@dataclass(frozen=True, slots=True)
class ScoreEvent(RunEvent):
    """Recall on the validation pairs.

    ``stage`` is the name of the stage, ``interpolated(name)`` or ``FINAL``; ``before`` and ``best``
    are earlier scores to compare with.
    """

    kind = "score"
    stage: str
    step: int
    before: float | None
    best: float | None
    mean_recall: float
    t2i_r1: float
    t2i_r5: float
    t2i_r10: float
    i2t_r1: float
    i2t_r5: float
    i2t_r10: float


@dataclass(frozen=True, slots=True)
class SavedEvent(RunEvent):
    """A saved state."""

    kind = "saved"
    stage: str
    step: int


@dataclass(frozen=True, slots=True)
class WarningEvent(RunEvent):
    """A warning."""

    kind = "warning"
    text: str


@dataclass(frozen=True, slots=True)
class EndEvent(RunEvent):
    """The end of a run; ``weights`` is the folder of the final model."""

    kind = "end"
    seconds: float
    weights: str

"""The events of a run: the lines of ``log.jsonl``, as typed values.

Field names and their order are those of the file. ``total`` counts the steps of all stages.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from cn_clip.translation import _

_RENAMED = {"rate": "lr", "learns": "trainable"}  # in logs of old runs
_MAX_VALUE = 1e15  # of a number; a larger one is damage
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
        """Return the event's own fields as JSON values, without ``total``."""
        return {name: value for name, value in asdict(self).items() if name != "total"}


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
    """A stage, as it starts or resumes; ``lr`` is the peak learning rate, ``trainable`` the number
    of trainable parameters."""

    kind = "stage"
    stage: str
    number: int
    step: int
    steps: int
    lr: float
    warmup: int
    batch: int
    trainable: int
    batch_norm: str | None


@dataclass(frozen=True, slots=True)
class StepEvent(RunEvent):
    """A training step; ``lr`` is its learning rate, ``skipped`` the unreadable pairs so far."""

    kind = "step"
    stage: str
    step: int
    loss: float
    mean_loss: float
    lr: float
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


@dataclass(frozen=True, slots=True)
class MixtureScore:
    """Interpolated weights: mean recall and contrastive loss on the validation pairs, and mean
    recall on the kept pairs if any."""

    weight: float
    score: float
    loss: float
    kept: float | None


@dataclass(frozen=True, slots=True)
class MixturesEvent(RunEvent):
    """The interpolated weights of a stage that were scored.

    ``weight`` is the chosen one; ``within`` whether the kept pairs lose at most one point by it.
    """

    kind = "mixtures"
    stage: str
    weight: float
    within: bool
    mixtures: list[MixtureScore]


_CLASSES = {
    cls.kind: cls
    for cls in (
        StartEvent, ResumedEvent, StageEvent, StepEvent, ScoreEvent, SavedEvent, WarningEvent,
        EndEvent, MixturesEvent,
    )
}  # fmt: skip


def parse(lines: Iterable[Mapping[str, Any]]) -> list[RunEvent]:
    """Return the events of a log's lines; damaged lines and unknown kinds are left out."""
    events = []
    for line in lines:
        values = {_RENAMED.get(name, name): value for name, value in line.items()}
        cls = _CLASSES.get(values["kind"]) if isinstance(values.get("kind"), str) else None
        if cls is not None:
            try:
                events.append(_build(cls, values))
            except ValueError:
                continue
    return events


def _build(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """Build a dataclass from JSON values; raise a ``ValueError`` for a missing or wrong field."""
    hints = get_type_hints(cls)
    given = {}
    for field in fields(cls):
        if field.name in values:
            given[field.name] = _converted(values[field.name], hints[field.name])
        elif field.default is MISSING:
            raise ValueError(_("{name} is missing", name=field.name))
    return cls(**given)


def _converted(value: Any, hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = get_args(hint)[0]
    if get_origin(hint) is list and isinstance(value, list):
        return [_converted(item, get_args(hint)[0]) for item in value]
    if hint is MixtureScore and isinstance(value, dict):
        return _build(MixtureScore, value)
    if hint is float and value in ("nan", "inf", "-inf"):  # as ``log`` writes them
        return float(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and abs(value) < _MAX_VALUE and (hint is float or type(value) is hint):
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise ValueError(_("{value!r:.60} is not {hint}", value=value, hint=hint))

"""What a stage holds still, and when it ends."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from cn_clip.errors import UsageError
from cn_clip.model.clip import CLIP
from cn_clip.model.text import SelfAttention
from cn_clip.train.recipe.schema import Plateau, Stage, Start

_TOWERS = ("visual", "bert")


def matched(patterns: Sequence[str], names: Iterable[str], option: str) -> set[str]:
    """Return the names that patterns with ``*`` and ``?`` match.

    Raises:
        UsageError: a pattern matches none; near matches are listed.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        mine = {name for name in names if fnmatchcase(name, pattern)}
        if not mine:
            raise UsageError(
                f"{option}: the pattern {pattern!r} matches no parameter{_near(pattern, names)}"
            )
        found |= mine
    return found


def _near(pattern: str, names: list[str]) -> str:
    parts = {
        ".".join(name.split(".")[: n + 1]) for name in names for n in range(name.count(".") + 1)
    }
    plain = pattern.replace("*", "").replace("?", "").strip(".")
    near = difflib.get_close_matches(plain, sorted(parts), n=3, cutoff=0.5)
    shown = ", ".join(f"{each}.*" if each not in names else each for each in near)
    return (
        f"; near it: {shown}" if near else "; see: cn-clip train --recipe RECIPE --show parameters"
    )


def freeze(model: CLIP, patterns: Sequence[str]) -> set[str]:
    """Freeze the parameters that patterns match, let all others learn; return the frozen names.

    Raises:
        UsageError: a pattern matches nothing.
    """
    frozen = matched(patterns, (name for name, _ in model.named_parameters()), "freeze")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return frozen


def statistics_frozen(stage: Stage, start: Start) -> bool:
    """Tell whether a stage keeps the running statistics of BatchNorm.

    Small batches of a narrow set move them away from what the trained weights expect, so a model
    that comes whole from a checkpoint keeps its own; towers that first meet here are trained as
    officially.
    """
    if stage.batch_norm == "auto":
        return start.checkpoint is not None and start.image is None and start.text is None
    return stage.batch_norm == "frozen"


def set_modes(
    model: CLIP, dropout: float | None = None, *, frozen_statistics: bool = False
) -> None:
    """Put in training mode what learns, and in eval mode what is frozen.

    A tower without a learning parameter is deterministic, as at inference; a frozen BatchNorm keeps
    its statistics, also in a tower that learns elsewhere. With ``frozen_statistics`` every
    BatchNorm does; its weight and bias may learn all the same.
    """
    model.train()
    for name in _TOWERS:
        tower = model.get_submodule(name)
        if not learns(tower):
            tower.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and (frozen_statistics or not learns(module)):
            module.eval()
        if dropout is not None and isinstance(module, nn.Dropout):
            module.p = dropout
        if dropout is not None and isinstance(module, SelfAttention):
            module.dropout = dropout


def batch_norm_mode(model: CLIP) -> str | None:
    """Return what a model in training does with the statistics of BatchNorm: ``"train"`` if any
    are updated, ``"frozen"`` if none is, None if it has no BatchNorm."""
    training = [m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return ("train" if any(training) else "frozen") if training else None


def learns(module: nn.Module) -> bool:
    """Tell whether any parameter of a module learns."""
    return any(parameter.requires_grad for parameter in module.parameters())


@dataclass(slots=True)
class Course:
    """How a stage has gone so far, as its end is judged by it.

    ``best`` is the highest score and ``best_step`` when it was; ``waited`` counts the evaluations
    since it last rose by the least gain that counts, which was to ``mark``. ``trained`` is the
    highest score of weights that the stage itself came to, at or below ``best``.
    """

    best: float | None = None
    best_step: int = 0
    mark: float | None = None
    waited: int = 0
    trained: float | None = None

    def add(self, score: float, step: int, plateau: Plateau | None, *, counts: bool = True) -> bool:
        """Take up a score; return whether it is the best so far.

        One that does not count, of the warm-up, is not waited for.
        """
        min_gain = 0.0 if plateau is None else plateau.min_gain
        if self.mark is None or score >= self.mark + max(min_gain, 1e-12):
            self.mark, self.waited = score, 0
        elif counts:
            self.waited += 1
        if self.best is not None and score <= self.best:
            return False
        self.best, self.best_step = score, step
        return True

    def add_trained(self, score: float) -> bool:
        """Take up a score of trained weights; return whether it is the best of those so far."""
        if self.trained is not None and score <= self.trained:
            return False
        self.trained = score
        return True

    def ended(self, plateau: Plateau | None) -> bool:
        """Tell whether the score has stopped to rise."""
        return plateau is not None and self.waited >= plateau.patience

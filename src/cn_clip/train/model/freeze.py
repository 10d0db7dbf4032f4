"""Which parameters are trainable, and the training mode of each module."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from cn_clip.errors import UsageError
from cn_clip.model.clip import CLIP
from cn_clip.model.text import SelfAttention
from cn_clip.train.recipe.schema import Stage, Start
from cn_clip.translation import _

_TOWERS = ("visual", "bert")


def match_names(patterns: Sequence[str], names: Iterable[str], option: str) -> set[str]:
    """Return the names that any of the patterns (with ``*`` and ``?``) matches.

    Raises:
        UsageError: a pattern matches no name; the message lists close matches.
    """
    names = list(names)
    result: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise UsageError(
                _(
                    "{option}: the pattern {pattern!r} matches no parameter{hint}",
                    option=option,
                    pattern=pattern,
                    hint=_hint(pattern, names),
                )
            )
        result |= matches
    return result


def _hint(pattern: str, names: list[str]) -> str:
    prefixes = {
        ".".join(name.split(".")[: n + 1]) for name in names for n in range(name.count(".") + 1)
    }
    plain = pattern.replace("*", "").replace("?", "").strip(".")
    close = difflib.get_close_matches(plain, sorted(prefixes), n=3, cutoff=0.5)
    if not close:
        return _("; see: cn-clip train --recipe RECIPE --show parameters")
    shown = ", ".join(prefix if prefix in names else f"{prefix}.*" for prefix in close)
    return _("; did you mean {shown}", shown=shown)


def freeze(model: CLIP, patterns: Sequence[str]) -> set[str]:
    """Freeze the parameters that match, make all others trainable; return the frozen names.

    Raises:
        UsageError: a pattern matches no parameter.
    """
    frozen = match_names(patterns, (name for name, _ in model.named_parameters()), "freeze")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return frozen


def statistics_frozen(stage: Stage, start: Start) -> bool:
    """Return whether a stage keeps the running statistics of BatchNorm.

    Small batches of a narrow dataset move the statistics away from what trained weights expect, so
    fine-tuning of a whole checkpoint keeps them. Training from separate towers updates them, as the
    official code does.
    """
    if stage.batch_norm == "auto":
        return start.checkpoint is not None and start.image is None and start.text is None
    return stage.batch_norm == "frozen"


def set_modes(
    model: CLIP, dropout: float | None = None, *, frozen_statistics: bool = False
) -> None:
    """Put trainable towers in training mode and frozen ones in eval mode.

    A frozen tower is deterministic, as at inference. A frozen BatchNorm keeps its statistics, in a
    trainable tower too. With ``frozen_statistics`` every BatchNorm does, while its weight and bias
    may still be trainable.
    """
    model.train()
    for name in _TOWERS:
        tower = model.get_submodule(name)
        if not is_trainable(tower):
            tower.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and (frozen_statistics or not is_trainable(module)):
            module.eval()
        if dropout is not None and isinstance(module, nn.Dropout):
            module.p = dropout
        if dropout is not None and isinstance(module, SelfAttention):
            module.dropout = dropout


def batch_norm_mode(model: CLIP) -> str | None:
    """Return ``"train"`` if any BatchNorm updates its statistics, ``"frozen"`` if none does, and
    None if the model has no BatchNorm."""
    training = [m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return ("train" if any(training) else "frozen") if training else None


def is_trainable(module: nn.Module) -> bool:
    """Return whether any parameter of a module is trainable."""
    return any(parameter.requires_grad for parameter in module.parameters())

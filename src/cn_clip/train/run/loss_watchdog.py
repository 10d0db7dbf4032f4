"""Ends a run whose loss is not finite or stays at chance, and names the likely cause."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from cn_clip.errors import TrainingError
from cn_clip.train.recipe.schema import Machine, Stage
from cn_clip.translation import _

_WINDOW = 50  # losses in the moving average
_AT_CHANCE = 0.98  # of ln(batch)


@dataclass(slots=True)
class LossWatchdog:
    """Checks the loss and the gradient norm of each step of a stage."""

    stage: Stage
    machine: Machine
    peak_lr: float
    stop_at_chance: int
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def check_gradient(self, norm: float, step: int) -> None:
        """Raise a ``TrainingError`` if the gradient norm is NaN or infinite."""
        if not math.isfinite(norm):
            raise TrainingError(self._not_finite(_("gradient norm"), norm, step))

    def check(self, loss: float, step: int) -> None:
        """Add the loss of a step (from 0).

        Raises:
            TrainingError: the loss is NaN or infinite, or stays at ln(batch), the loss of a model
                that does not distinguish the pairs of a batch.
        """
        if not math.isfinite(loss):
            raise TrainingError(self._not_finite("loss", loss, step))
        self._recent.append(loss)
        batch, lr = self.stage.global_batch_size, self._lr_text
        chance = math.log(batch)
        full, options = len(self._recent) == _WINDOW, self.stage.loss
        # Text targets and teacher features add terms that chance does not account for.
        contrastive_only = options.text_targets is None and not (
            options.teacher and options.teacher_features
        )
        # Counted from the end of the warm-up, in which the loss falls slowly.
        late = step + 1 >= self.stage.optimizer.warmup + self.stop_at_chance
        if self.stop_at_chance and late and full:
            mean = sum(self._recent) / _WINDOW
            if options.kind == "clip" and contrastive_only and mean >= _AT_CHANCE * chance:
                raise TrainingError(
                    _(
                        "after {step} steps the loss is {mean:.3f}, and ln({batch}) = "
                        "{chance:.3f} is chance. Either {lr} is too high: start again with a "
                        "tenth; or images and texts do not match: cn-clip data check; or all "
                        "pairs of a batch are alike. --stop-at-chance 0 continues",
                        step=step + 1,
                        mean=mean,
                        batch=batch,
                        chance=chance,
                        lr=lr,
                    )
                )

    @property
    def _lr_text(self) -> str:
        return _(
            "the learning rate ({peak_lr:.1e} for a batch of {global_batch_size})",
            peak_lr=self.peak_lr,
            global_batch_size=self.stage.global_batch_size,
        )

    def _not_finite(self, name: str, value: float, step: int) -> str:
        cause = (
            _("float16 has probably overflowed; use --precision bf16")
            if self.machine.precision == "fp16"
            else _(
                "{learning_rate} is probably too high; use a tenth, and --max-grad-norm 1",
                learning_rate=self._lr_text,
            )
        )
        return _(
            "the {name} is {value} at step {step} of stage {stage}: {cause}. The best weights and "
            "the last state are kept",
            name=name,
            value=value,
            step=step + 1,
            stage=self.stage.name,
            cause=cause,
        )

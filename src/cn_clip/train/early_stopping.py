"""Early stopping: the best score of a stage, and whether the score has stopped improving."""

from __future__ import annotations

from dataclasses import dataclass

from cn_clip.train.recipe.schema import EarlyStoppingOptions


@dataclass(slots=True)
class EarlyStopping:
    """The scores of a stage so far.

    Attributes:
        best: highest score, that of the initial weights included.
        best_step: step of the highest score.
        mark: last score that improved by at least ``min_gain``.
        waited: evaluations since ``mark``.
        trained: highest score of weights trained in this stage, at most ``best``.
    """

    best: float | None = None
    best_step: int = 0
    mark: float | None = None
    waited: int = 0
    trained: float | None = None

    def add(
        self,
        score: float,
        step: int,
        options: EarlyStoppingOptions | None,
        *,
        counts: bool = True,
    ) -> bool:
        """Add a score; return whether it is the best so far.

        ``counts=False``, for scores within the warm-up, does not use up the patience.
        """
        min_gain = 0.0 if options is None else options.min_gain
        if self.mark is None or score >= self.mark + max(min_gain, 1e-12):
            self.mark, self.waited = score, 0
        elif counts:
            self.waited += 1
        if self.best is not None and score <= self.best:
            return False
        self.best, self.best_step = score, step
        return True

    def add_trained(self, score: float) -> bool:
        """Add a score of trained weights; return whether it is the best of those so far."""
        if self.trained is not None and score <= self.trained:
            return False
        self.trained = score
        return True

    def ended(self, options: EarlyStoppingOptions | None) -> bool:
        """Return whether the score has stopped improving."""
        return options is not None and self.waited >= options.patience

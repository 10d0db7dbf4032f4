"""Bootstrap confidence intervals of paired differences; numpy only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import UsageError
from cn_clip.translation import _

_COUNTS = 1 << 22  # counts in memory at a time, 32 MiB

Values = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference of means and its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is significant at the interval's level."""
        return self.low > 0 or self.high < 0


def paired_interval(
    ours: Values, theirs: Values, *, level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> Interval:
    """Return mean(ours) - mean(theirs) with the percentile interval of the paired bootstrap.

    Queries are resampled with replacement, each with both of its values (Efron and Tibshirani, "An
    Introduction to the Bootstrap", 1993, chapters 13 and 16). Queries are treated as independent;
    the five captions of one image are not, so the interval is then too narrow.

    The counts of the distinct differences in a resample are multinomial, so the cost depends on
    the number of distinct differences: seven for the mean of recall at 1, 5 and 10.

    Args:
        ours: one value per query (Q,), such as 1 for a hit and 0 for a miss.
        theirs: values of the same queries (Q,).
        level: confidence level.
        samples: number of resamples.
        seed: of the resamples.

    Raises:
        UsageError: lengths differ, there is no query, or a value is not finite.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.ndim != 1 or ours.shape != theirs.shape or not len(ours):
        raise UsageError(
            _(
                "values of shape {shape} and {theirs_shape} are not paired; give two values per "
                "query, and at least one query",
                shape=ours.shape,
                theirs_shape=theirs.shape,
            )
        )
    if not 0 < level < 1 or samples < 1:
        raise UsageError(
            _(
                "level {level} and {samples} samples; give 0 < level < 1 and samples >= 1",
                level=level,
                samples=samples,
            )
        )
    # Rounded, so that equal differences computed in different ways are one value.
    differences = (ours - theirs).round(12)
    if not np.isfinite(differences).all():
        raise UsageError(_("a value is NaN or infinite; remove such queries"))
    values, counts = np.unique(differences, return_counts=True)
    means = np.concatenate(list(_resampled(values, counts, samples, np.random.default_rng(seed))))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    value, low, high = np.round([differences.mean(), low, high], 12).tolist()
    return Interval(value, low, high)


def _resampled(
    values: Values, counts: Values, samples: int, rng: np.random.Generator
) -> Iterator[Values]:
    total = counts.sum()
    step = max(1, _COUNTS // len(values))
    for start in range(0, samples, step):
        resampled = rng.multinomial(total, counts / total, size=min(step, samples - start))
        yield resampled @ values / total

"""How sure a difference between two answers to the same queries is; numpy alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import UsageError

_CELLS = 1 << 22  # counts drawn at a time, 32 MiB

Values = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference of means, and the interval that holds it."""

    value: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_interval(
    ours: Values, theirs: Values, *, level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> Interval:
    """Return mean(ours) - mean(theirs), with the percentile interval of the paired bootstrap.

    Queries are drawn again with replacement, each with both its answers (Efron and Tibshirani,
    "An Introduction to the Bootstrap", 1993, chapters 13 and 16). Queries count as independent of
    each other: five captions of one picture are not quite, and the interval is then too narrow.

    Only how often each difference is drawn matters, and those counts are multinomial: the cost
    goes with the number of distinct differences, seven for the mean of recall at 1, 5 and 10.

    Args:
        ours: a value for each query (Q,), such as 1 for a hit and 0 for a miss.
        theirs: the same queries' other values (Q,).
        level: the share of resamples within the interval.
        samples: resamples.
        seed: of the resamples; the same seed gives the same interval.

    Raises:
        UsageError: the lengths differ, there is no query, or a value is not finite.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.ndim != 1 or ours.shape != theirs.shape or not len(ours):
        raise UsageError(
            f"values of shape {ours.shape} and {theirs.shape} are not pairs; give one of each for "
            "every query, and at least one query"
        )
    if not 0 < level < 1 or samples < 1:
        raise UsageError(
            f"level {level} and {samples} samples; give 0 < level < 1 and samples >= 1"
        )
    # Rounded, so that 1/3 - 1 is one difference, whichever way it was computed.
    differences = (ours - theirs).round(12)
    if not np.isfinite(differences).all():
        raise UsageError("a value is NaN or infinite; leave such queries out")
    values, counts = np.unique(differences, return_counts=True)
    means = np.concatenate(list(_resampled(values, counts, samples, np.random.default_rng(seed))))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    value, low, high = np.round([differences.mean(), low, high], 12).tolist()
    return Interval(value, low, high)


def _resampled(
    values: Values, counts: Values, samples: int, rng: np.random.Generator
) -> Iterator[Values]:
    total = counts.sum()
    step = max(1, _CELLS // len(values))
    for at in range(0, samples, step):
        drawn = rng.multinomial(total, counts / total, size=min(step, samples - at))
        yield drawn @ values / total

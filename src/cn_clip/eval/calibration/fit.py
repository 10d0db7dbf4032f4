"""Fit what a model's cosines mean, and measure on other pairs how far that holds; numpy alone.

The probability is fitted to the cosines of pairs and of non-pairs of the same data, weighted so
that pairs weigh ``prior`` and non-pairs the rest. The thresholds are fitted in ``thresholds``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

import numpy as np
import numpy.typing as npt

from cn_clip.calibration import Calibration, Curve, Isotonic, Kind, Logistic, probability
from cn_clip.errors import UsageError
from cn_clip.eval.calibration.thresholds import Answered, all_answers, answered, threshold_for
from cn_clip.eval.metrics.recall import Pairs
from cn_clip.topk import Vectors, checked

# What LAION-5B kept of pairs that are not English (Schuhmann et al., arXiv:2210.08402, section 3).
FIXED_CUTOFF = 0.26
_BINS = 15
_NON_PAIRS = 1 << 18  # drawn at random where there are more
_LEAST_PAIRS = 20  # to fit a curve to

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Scored:
    """Pairs and non-pairs: ``cosines`` (P,), whether they ``match`` (P,), ``weights`` (P,) that
    sum to 1."""

    cosines: Floats
    match: Flags
    weights: Floats


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of like probability: its ``mean``, the ``share`` that match, how many ``pairs`` do."""

    mean: float
    share: float
    pairs: int


@dataclass(frozen=True, slots=True)
class Judged:
    """How good probabilities are.

    ``ece`` is the expected calibration error (Guo et al., 2017, arXiv:1706.04599, equation 3), over
    bins of equal weight; ``brier`` the mean squared error; ``right`` the share judged rightly at
    a half; ``bins`` what a reliability diagram shows.
    """

    ece: float
    brier: float
    right: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A calibration fitted on one half of the pictures and judged on the other, beside the fixed
    cutoff; ``answers`` and ``fixed_answers`` are by use."""

    calibrated: Judged
    fixed: Judged
    answers: Mapping[str, Answered]
    fixed_answers: Mapping[str, Answered]


def calibrate(
    images: Vectors,
    texts: Vectors,
    pairs: Pairs,
    *,
    model: str,
    fingerprint: str,
    data: str,
    kind: Kind = "logistic",
    precision: float = 0.9,
    prior: float = 0.5,
    seed: int = 0,
) -> tuple[Calibration, HeldOut]:
    """Fit a calibration on all pairs; judge its like, fitted on half of them, on the other half.

    Args:
        images: unit vectors (N, D).
        texts: unit vectors (M, D), each text once.
        pairs: rows (P, 2), an image's and a text's, of all that belong together.
        model: name of the model, for people.
        fingerprint: of the embedder that made the vectors.
        data: digest of the pictures and texts.
        kind: of curve.
        precision: share of right answers that the thresholds aim at.
        prior: share of matches among the pairs that the probability is for.
        seed: of the halves, and of the non-pairs that are drawn.

    Raises:
        UsageError: a vector is not finite, there are too few pairs, pairs have no higher cosines
            than non-pairs, or an option is out of range.
    """
    for name, value in (("precision", precision), ("prior", prior)):
        if not 0 < value < 1:
            raise UsageError(f"{name} {value} is not between 0 and 1; such as 0.9")
    images, texts = checked(images, "images"), checked(texts, "texts")
    fitted_on, judged_on = (_subset(images, texts, half) for half in halves(pairs, seed=seed))
    curve, _, thresholds = _fitted(fitted_on, kind, precision, prior, seed)
    held_out = _judged(judged_on, curve, thresholds, prior, seed)
    curve, scored, thresholds = _fitted((images, texts, pairs), kind, precision, prior, seed)
    counts = {
        "images": len(images),
        "texts": len(texts),
        "pairs": int(scored.match.sum()),
        "non_pairs": int((~scored.match).sum()),
    }
    today = date.today().isoformat()
    fitted = Calibration(
        model, fingerprint, curve, prior, precision, thresholds, counts, data, today
    )
    return fitted, held_out


def halves(pairs: Pairs, *, seed: int) -> tuple[Pairs, Pairs]:
    """Split pairs (P, 2) by picture, at random; a text of both halves stays in the first only."""
    pictures = np.unique(pairs[:, 0])
    first = np.random.default_rng(seed).permutation(pictures)[: (len(pictures) + 1) // 2]
    mine = np.isin(pairs[:, 0], first)
    return pairs[mine], pairs[~mine & ~np.isin(pairs[:, 1], pairs[mine, 1])]


def score_pairs(
    images: Vectors, texts: Vectors, pairs: Pairs, *, prior: float, seed: int
) -> Scored:
    """Score the pairs, and all non-pairs or a random quarter of a million of them."""
    size = len(images) * len(texts)
    own = np.unique(pairs[:, 0] * len(texts) + pairs[:, 1])
    if size <= _NON_PAIRS:
        other = np.arange(size)
    else:
        other = np.unique(np.random.default_rng(seed).integers(0, size, _NON_PAIRS))
    other = other[~np.isin(other, own)]
    if len(own) < _LEAST_PAIRS or not len(other):
        raise UsageError(
            f"{len(own)} pairs and {len(other)} non-pairs in a half are too few to tell what a "
            f"cosine means; give at least {2 * _LEAST_PAIRS} pairs of different texts"
        )
    row, column = np.divmod(np.concatenate([own, other]), len(texts))
    cosines = np.empty(len(row))
    for at in range(0, len(row), 1 << 13):
        here = slice(at, at + (1 << 13))
        cosines[here] = np.einsum("nd,nd->n", images[row[here]], texts[column[here]])
    match = np.arange(len(row)) < len(own)
    weights = np.where(match, prior / len(own), (1 - prior) / len(other))
    return Scored(cosines, match, weights)


def fit(scored: Scored, kind: Kind) -> Curve:
    """Fit a curve of that kind."""
    return fit_logistic(scored) if kind == "logistic" else fit_isotonic(scored)


def fit_logistic(scored: Scored) -> Logistic:
    """Fit by Newton's method, with Platt's targets ("Probabilistic Outputs for Support Vector
    Machines", 1999, section 2.2), which stay off 0 and 1 and so keep a perfect split finite.

    Raises:
        UsageError: pairs have no higher cosines than non-pairs.
    """
    middle, spread = scored.cosines.mean(), scored.cosines.std() or 1.0
    x = np.stack([(scored.cosines - middle) / spread, np.ones_like(scored.cosines)], axis=1)
    targets, weights = _targets(scored.match), scored.weights
    beta, loss = np.zeros(2), np.inf

    def loss_at(beta: Floats) -> float:
        logits = x @ beta
        return float(weights @ (np.logaddexp(0, logits) - targets * logits))

    for _ in range(100):
        p = (1 + np.tanh(x @ beta / 2)) / 2
        slope = x.T @ (weights * (p - targets))
        bend = (x * (weights * p * (1 - p))[:, None]).T @ x + 1e-12 * np.eye(2)
        step, loss = np.linalg.solve(bend, slope), loss_at(beta)
        while loss_at(beta - step) > loss and np.abs(step).max() > 1e-12:
            step = step / 2
        beta = beta - step
        if np.abs(step).max() < 1e-10:
            break
    _check_rising(beta[0] > 0)
    return Logistic(float(beta[0] / spread), float(beta[1] - beta[0] * middle / spread))


def fit_isotonic(scored: Scored) -> Isotonic:
    """Fit the closest curve that never falls, by pooling neighbours that do (Zadrozny and Elkan,
    2002): all runs that fall at once, until none does.

    Raises:
        UsageError: pairs have no higher cosines than non-pairs.
    """
    low, group = np.unique(scored.cosines, return_inverse=True)
    mass = np.bincount(group, scored.weights)
    value = np.bincount(group, scored.weights * _targets(scored.match)) / mass
    high = low
    while np.any(falling := value[1:] <= value[:-1]) and len(value) > 1:
        starts = np.flatnonzero(np.concatenate([[True], ~falling]))
        ends = np.concatenate([starts[1:], [len(value)]]) - 1
        total = np.add.reduceat(mass, starts)
        value = np.add.reduceat(mass * value, starts) / total
        mass, low, high = total, low[starts], high[ends]
    _check_rising(len(value) > 1)
    knots, first = np.unique(np.stack([low, high], axis=1).ravel(), return_index=True)
    rises = np.repeat(value, 2)[first]
    return Isotonic(tuple(knots.tolist()), tuple(rises.tolist()))


def judge(probabilities: Floats, scored: Scored) -> Judged:
    """Compare probabilities (P,) with what matches; equal ones share a bin."""
    weights, match = scored.weights / scored.weights.sum(), scored.match
    values, group = np.unique(probabilities, return_inverse=True)
    mass = np.bincount(group, weights)
    place = np.cumsum(mass) - mass / 2  # the middle of each group, in [0, 1]
    bins = np.minimum((place * _BINS).astype(np.int64), _BINS - 1)
    held = np.bincount(bins, mass, _BINS)
    said = np.bincount(bins, mass * values, _BINS)
    true = np.bincount(bins, np.bincount(group, weights * match), _BINS)
    pairs = np.bincount(bins, np.bincount(group, match), _BINS)
    full = held > 0
    return Judged(
        ece=float(np.abs(said - true).sum()),
        brier=float(weights @ (probabilities - match) ** 2),
        right=float(weights @ ((probabilities >= 0.5) == match)),
        bins=tuple(
            Bin(float(s / h), float(t / h), int(n))
            for s, t, h, n in zip(said[full], true[full], held[full], pairs[full], strict=True)
        ),
    )


_Set = tuple[Vectors, Vectors, Pairs]
_Thresholds = dict[str, float | None]


def _subset(images: Vectors, texts: Vectors, pairs: Pairs) -> _Set:
    mine, image = np.unique(pairs[:, 0], return_inverse=True)
    said, text = np.unique(pairs[:, 1], return_inverse=True)
    return images[mine], texts[said], np.stack([image, text], axis=1)


def _fitted(
    on: _Set, kind: Kind, precision: float, prior: float, seed: int
) -> tuple[Curve, Scored, _Thresholds]:
    scored = score_pairs(*on, prior=prior, seed=seed)
    thresholds = {
        name: threshold_for(found, precision) for name, found in all_answers(*on, seed=seed).items()
    }
    return fit(scored, kind), scored, thresholds


def _judged(on: _Set, curve: Curve, thresholds: _Thresholds, prior: float, seed: int) -> HeldOut:
    scored = score_pairs(*on, prior=prior, seed=seed)
    found = all_answers(*on, seed=seed)
    return HeldOut(
        calibrated=judge(probability(curve, scored.cosines), scored),
        fixed=judge((scored.cosines >= FIXED_CUTOFF).astype(np.float64), scored),
        answers={name: answered(each, thresholds[name]) for name, each in found.items()},
        fixed_answers={name: answered(each, FIXED_CUTOFF) for name, each in found.items()},
    )


def _targets(match: Flags) -> Floats:
    some, others = match.sum(), (~match).sum()
    targets: Floats = np.where(match, (some + 1) / (some + 2), 1 / (others + 2))
    return targets


def _check_rising(rises: bool) -> None:
    if not rises:
        raise UsageError(
            "pairs have no higher cosines than non-pairs, so a cosine of this model says nothing "
            "here; check that the pairs are pairs, or take another model"
        )

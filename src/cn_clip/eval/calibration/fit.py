"""Fit a calibration and score it on held-out pairs; numpy only.

The curve is fitted to the cosines of pairs and non-pairs of the same data, weighted so that pairs
have a total weight of ``prior`` and non-pairs the rest. ``thresholds`` fits the thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

import numpy as np
import numpy.typing as npt

from cn_clip.calibration import Calibration, Curve, CurveKind, Isotonic, Logistic, probability
from cn_clip.errors import UsageError
from cn_clip.eval.calibration.thresholds import (
    ThresholdEffect,
    fit_threshold,
    threshold_effect,
    top_matches,
)
from cn_clip.eval.metrics.recall import Pairs
from cn_clip.topk import Vectors, checked_vectors
from cn_clip.translation import _

# LAION-5B's cutoff for non-English pairs (Schuhmann et al., arXiv:2210.08402, section 3).
FIXED_CUTOFF = 0.26
_BINS = 15
_NON_PAIRS = 1 << 18  # if there are more, a random sample of this size
_MIN_PAIRS = 20  # to fit a curve

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class PairCosines:
    """Pairs and non-pairs: ``cosines`` (P,), whether they ``match`` (P,), and ``weights`` (P,) that
    sum to 1."""

    cosines: Floats
    match: Flags
    weights: Floats


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of similar probability: the ``mean`` probability, the fraction ``matching``, and the
    number of matching ``pairs``."""

    mean: float
    matching: float
    pairs: int


@dataclass(frozen=True, slots=True)
class CalibrationScores:
    """Scores of probabilities of a match.

    ``ece`` is the expected calibration error (Guo et al., 2017, arXiv:1706.04599, equation 3) over
    bins of equal weight; ``brier`` the mean squared error; ``accuracy`` that of the decision at
    0.5; ``bins`` the points of a reliability diagram.
    """

    ece: float
    brier: float
    accuracy: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Scores, on one half of the images, of a calibration fitted on the other half and of the fixed
    cutoff; ``effects`` and ``fixed_effects`` are those of the thresholds, by use."""

    calibrated: CalibrationScores
    fixed: CalibrationScores
    effects: Mapping[str, ThresholdEffect]
    fixed_effects: Mapping[str, ThresholdEffect]


def fit_calibration(
    images: Vectors,
    texts: Vectors,
    pairs: Pairs,
    *,
    model: str,
    fingerprint: str,
    data: str,
    kind: CurveKind = "logistic",
    precision: float = 0.9,
    prior: float = 0.5,
    seed: int = 0,
) -> tuple[Calibration, HeldOut]:
    """Fit a calibration on all pairs; score another, fitted on half of them, on the other half.

    Args:
        images: unit vectors (N, D).
        texts: unit vectors (M, D), each text once.
        pairs: (P, 2) rows of an image and a text, all that match.
        model: name of the model, for display.
        fingerprint: of the embedder that made the vectors.
        data: digest of the images and texts.
        kind: of the curve.
        precision: target precision of accepted results.
        prior: fraction of matching pairs that the probability assumes.
        seed: of the split, of sampled non-pairs and of sampled labels.

    Raises:
        UsageError: a vector is not finite, there are too few pairs, cosines of pairs are not higher
            than those of non-pairs, or an option is out of range.
    """
    for name, value in (("precision", precision), ("prior", prior)):
        if not 0 < value < 1:
            raise UsageError(
                _(
                    "{name} {value} is not between 0 and 1; give a value such as 0.9",
                    name=name,
                    value=value,
                )
            )
    images, texts = checked_vectors(images, "images"), checked_vectors(texts, "texts")
    train, held_out = (_subset(images, texts, half) for half in halves(pairs, seed=seed))
    curve, _unused, thresholds = _fit(train, kind, precision, prior, seed)
    scores = _score(held_out, curve, thresholds, prior, seed)
    curve, cosines, thresholds = _fit((images, texts, pairs), kind, precision, prior, seed)
    counts = {
        "images": len(images),
        "texts": len(texts),
        "pairs": int(cosines.match.sum()),
        "non_pairs": int((~cosines.match).sum()),
    }
    today = date.today().isoformat()
    calibration = Calibration(
        model, fingerprint, curve, prior, precision, thresholds, counts, data, today
    )
    return calibration, scores


def halves(pairs: Pairs, *, seed: int) -> tuple[Pairs, Pairs]:
    """Split pairs (P, 2) by image, at random; texts of both halves are kept in the first only."""
    images = np.unique(pairs[:, 0])
    chosen = np.random.default_rng(seed).permutation(images)[: (len(images) + 1) // 2]
    first = np.isin(pairs[:, 0], chosen)
    return pairs[first], pairs[~first & ~np.isin(pairs[:, 1], pairs[first, 1])]


def pair_cosines(
    images: Vectors, texts: Vectors, pairs: Pairs, *, prior: float, seed: int
) -> PairCosines:
    """Return the cosines of all pairs, and of all non-pairs or a random quarter of a million."""
    size = len(images) * len(texts)
    matching = np.unique(pairs[:, 0] * len(texts) + pairs[:, 1])
    if size <= _NON_PAIRS:
        other = np.arange(size)
    else:
        other = np.unique(np.random.default_rng(seed).integers(0, size, _NON_PAIRS))
    other = other[~np.isin(other, matching)]
    if len(matching) < _MIN_PAIRS or not len(other):
        raise UsageError(
            _(
                "{pair_count} pairs and {non_pair_count} non-pairs in a half are too few to fit a "
                "calibration; give at least {min_pairs} pairs with different texts",
                pair_count=len(matching),
                non_pair_count=len(other),
                min_pairs=2 * _MIN_PAIRS,
            )
        )
    row, column = np.divmod(np.concatenate([matching, other]), len(texts))
    cosines = np.empty(len(row))
    for start in range(0, len(row), 1 << 13):
        batch = slice(start, start + (1 << 13))
        cosines[batch] = np.einsum("nd,nd->n", images[row[batch]], texts[column[batch]])
    match = np.arange(len(row)) < len(matching)
    weights = np.where(match, prior / len(matching), (1 - prior) / len(other))
    return PairCosines(cosines, match, weights)


def fit_curve(data: PairCosines, kind: CurveKind) -> Curve:
    """Fit a logistic or an isotonic curve."""
    return fit_logistic(data) if kind == "logistic" else fit_isotonic(data)


def fit_logistic(data: PairCosines) -> Logistic:
    """Fit by Newton's method with Platt's targets ("Probabilistic Outputs for Support Vector
    Machines", 1999, section 2.2); they are strictly between 0 and 1, so the coefficients stay
    finite for separable data.

    Raises:
        UsageError: cosines of pairs are not higher than those of non-pairs.
    """
    mean, deviation = data.cosines.mean(), data.cosines.std() or 1.0
    x = np.stack([(data.cosines - mean) / deviation, np.ones_like(data.cosines)], axis=1)
    targets, weights = _targets(data.match), data.weights
    beta, loss = np.zeros(2), np.inf

    def loss_at(beta: Floats) -> float:
        logits = x @ beta
        return float(weights @ (np.logaddexp(0, logits) - targets * logits))

    for _unused in range(100):
        p = (1 + np.tanh(x @ beta / 2)) / 2
        gradient = x.T @ (weights * (p - targets))
        hessian = (x * (weights * p * (1 - p))[:, None]).T @ x + 1e-12 * np.eye(2)
        step, loss = np.linalg.solve(hessian, gradient), loss_at(beta)
        while loss_at(beta - step) > loss and np.abs(step).max() > 1e-12:
            step = step / 2
        beta = beta - step
        if np.abs(step).max() < 1e-10:
            break
    _check_increasing(beta[0] > 0)
    return Logistic(float(beta[0] / deviation), float(beta[1] - beta[0] * mean / deviation))


def fit_isotonic(data: PairCosines) -> Isotonic:
    """Fit the closest non-decreasing curve by pooling adjacent violators (Zadrozny and Elkan,
    2002); each pass pools all decreasing runs, until there are none.

    Raises:
        UsageError: cosines of pairs are not higher than those of non-pairs.
    """
    low, group = np.unique(data.cosines, return_inverse=True)
    mass = np.bincount(group, data.weights)
    value = np.bincount(group, data.weights * _targets(data.match)) / mass
    high = low
    while np.any(decreasing := value[1:] <= value[:-1]) and len(value) > 1:
        starts = np.flatnonzero(np.concatenate([[True], ~decreasing]))
        ends = np.concatenate([starts[1:], [len(value)]]) - 1
        total = np.add.reduceat(mass, starts)
        value = np.add.reduceat(mass * value, starts) / total
        mass, low, high = total, low[starts], high[ends]
    _check_increasing(len(value) > 1)
    knots, first = np.unique(np.stack([low, high], axis=1).ravel(), return_index=True)
    probabilities = np.repeat(value, 2)[first]
    return Isotonic(tuple(knots.tolist()), tuple(probabilities.tolist()))


def score_probabilities(probabilities: Floats, data: PairCosines) -> CalibrationScores:
    """Score probabilities (P,) of a match; equal ones share a bin."""
    weights, match = data.weights / data.weights.sum(), data.match
    values, group = np.unique(probabilities, return_inverse=True)
    mass = np.bincount(group, weights)
    middle = np.cumsum(mass) - mass / 2  # cumulative weight at the middle of each group, in [0, 1]
    bins = np.minimum((middle * _BINS).astype(np.int64), _BINS - 1)
    weight = np.bincount(bins, mass, _BINS)
    predicted = np.bincount(bins, mass * values, _BINS)
    true = np.bincount(bins, np.bincount(group, weights * match), _BINS)
    pairs = np.bincount(bins, np.bincount(group, match), _BINS)
    return CalibrationScores(
        ece=float(np.abs(predicted - true).sum()),
        brier=float(weights @ (probabilities - match) ** 2),
        accuracy=float(weights @ ((probabilities >= 0.5) == match)),
        bins=tuple(
            Bin(float(predicted[n] / weight[n]), float(true[n] / weight[n]), int(pairs[n]))
            for n in np.flatnonzero(weight > 0)
        ),
    )


_Set = tuple[Vectors, Vectors, Pairs]
_Thresholds = dict[str, float | None]


def _subset(images: Vectors, texts: Vectors, pairs: Pairs) -> _Set:
    image_rows, image = np.unique(pairs[:, 0], return_inverse=True)
    text_rows, text = np.unique(pairs[:, 1], return_inverse=True)
    return images[image_rows], texts[text_rows], np.stack([image, text], axis=1)


def _fit(
    data: _Set, kind: CurveKind, precision: float, prior: float, seed: int
) -> tuple[Curve, PairCosines, _Thresholds]:
    cosines = pair_cosines(*data, prior=prior, seed=seed)
    matches = top_matches(*data, seed=seed)
    thresholds = {use: fit_threshold(top, precision) for use, top in matches.items()}
    return fit_curve(cosines, kind), cosines, thresholds


def _score(data: _Set, curve: Curve, thresholds: _Thresholds, prior: float, seed: int) -> HeldOut:
    pairs = pair_cosines(*data, prior=prior, seed=seed)
    matches = top_matches(*data, seed=seed)
    return HeldOut(
        calibrated=score_probabilities(probability(curve, pairs.cosines), pairs),
        fixed=score_probabilities((pairs.cosines >= FIXED_CUTOFF).astype(np.float64), pairs),
        effects={use: threshold_effect(top, thresholds[use]) for use, top in matches.items()},
        fixed_effects={use: threshold_effect(top, FIXED_CUTOFF) for use, top in matches.items()},
    )


def _targets(match: Flags) -> Floats:
    positive, negative = match.sum(), (~match).sum()
    targets: Floats = np.where(match, (positive + 1) / (positive + 2), 1 / (negative + 2))
    return targets


def _check_increasing(increasing: bool) -> None:
    if not increasing:
        raise UsageError(
            _(
                "pairs have no higher cosines than non-pairs, so no calibration can be fitted; "
                "check the pairs, or choose another model"
            )
        )

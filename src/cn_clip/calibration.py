"""What a model's cosines mean: the probability of a match, and when nothing matches.

A calibration belongs to one model in one precision, told by its fingerprint, and is a small JSON
file. ``cn_clip.eval.calibration.fit`` fits it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cn_clip.embedder import Embedder
from cn_clip.errors import UsageError
from cn_clip.outputs import claim, own_file, starts_with
from cn_clip.publish import write_text

Kind = Literal["logistic", "isotonic"]
KINDS: tuple[Kind, ...] = ("logistic", "isotonic")
USES = ("search", "labels")
COUNTS = ("images", "texts", "pairs", "non_pairs")
_FORMAT = "cn-clip calibration 1"
_LARGEST = 1e30  # of any number in the file; products of two stay finite
_REMEDY = "fit one with: cn-clip eval calibrate"


@dataclass(frozen=True, slots=True)
class Logistic:
    """``1 / (1 + exp(-(slope * cosine + intercept)))`` (Platt, 1999)."""

    slope: float
    intercept: float


@dataclass(frozen=True, slots=True)
class Isotonic:
    """A rising line through ``probabilities`` at ``cosines``, level beyond both ends."""

    cosines: tuple[float, ...]
    probabilities: tuple[float, ...]


Curve = Logistic | Isotonic


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was fitted, for which model, and on what.

    Attributes:
        model: the model's name, for people.
        fingerprint: the ``Embedder.fingerprint`` that it holds for.
        curve: from cosine to probability.
        prior: the probability is that of a pair drawn where this share of pairs match.
        precision: the share of right answers that the thresholds aim at.
        thresholds: the cosine below which the best is no match, for ``search`` (all pictures by a
            text) and for ``labels`` (ten, for a picture); None where none reaches the precision.
        counts: images, texts, pairs and non-pairs that it was fitted on.
        data: digest of the pictures and texts.
        date: the day of the fit, such as ``2025-01-31``.
    """

    model: str
    fingerprint: str
    curve: Curve
    prior: float
    precision: float
    thresholds: Mapping[str, float | None]
    counts: Mapping[str, int]
    data: str
    date: str

    @property
    def kind(self) -> Kind:
        return "logistic" if isinstance(self.curve, Logistic) else "isotonic"


def probability(curve: Curve, cosines: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the probability of a match for cosines of any shape, float64 of the same shape."""
    cosines = np.asarray(cosines, np.float64)
    shares: npt.NDArray[np.float64]
    if isinstance(curve, Isotonic):
        shares = np.interp(cosines, curve.cosines, curve.probabilities)
    else:  # the logistic function, without overflow
        shares = (1 + np.tanh((curve.slope * cosines + curve.intercept) / 2)) / 2
    return shares


def check_model(calibration: Calibration, embedder: Embedder) -> None:
    """Refuse a calibration that was fitted for another model, precision or preprocessing.

    Raises:
        UsageError: the fingerprints differ.
    """
    if calibration.fingerprint != embedder.fingerprint:
        raise UsageError(
            f"the calibration is for {calibration.model!r} with fingerprint "
            f"{calibration.fingerprint:.8}, but this is {embedder.name!r} with "
            f"{embedder.fingerprint:.8} (weights, precision and preprocessing count); {_REMEDY}"
        )


def claim_calibration(
    out: str | Path, *, inputs: Iterable[str | Path] = (), overwrite: bool = False
) -> Path:
    """Check that a calibration may be written to ``out``; nothing is touched. Return it as a path.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    own = starts_with(f'{{\n  "format": "{_FORMAT}"'.encode())
    return claim(out, own_file("eval calibrate", own), inputs=inputs, overwrite=overwrite)


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file, whole or not at all."""
    values = {
        "format": _FORMAT,
        "model": calibration.model,
        "fingerprint": calibration.fingerprint,
        "kind": calibration.kind,
        "coefficients": asdict(calibration.curve),
        "prior": calibration.prior,
        "precision": calibration.precision,
        "thresholds": dict(calibration.thresholds),
        "counts": dict(calibration.counts),
        "data": calibration.data,
        "date": calibration.date,
    }
    write_text(path, json.dumps(values, ensure_ascii=False, indent=2) + "\n")


def read_calibration(path: Path) -> Calibration:
    """Read the file strictly: what is missing, unknown or out of range is refused.

    Raises:
        UsageError: it cannot be read, or is no calibration; the first reason is named.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; {_REMEDY}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
        raise UsageError(f"{path} is no calibration ({error}); {_REMEDY}") from None
    try:
        return _checked(values)
    except ValueError as error:
        raise UsageError(f"{path} is no calibration: {error}; {_REMEDY}") from None


def _checked(values: Any) -> Calibration:
    names = [
        "format", "model", "fingerprint", "kind", "coefficients", "prior", "precision",
        "thresholds", "counts", "data", "date",
    ]  # fmt: skip
    _exactly(values, names, "it")
    if values["format"] != _FORMAT:
        raise ValueError(f"its format is {values['format']!r:.60}, not {_FORMAT!r}")
    for name in ("model", "fingerprint", "data", "date"):
        if not isinstance(values[name], str) or not values[name]:
            raise ValueError(f"{name} is {values[name]!r:.60}, not a string")
    for name in ("prior", "precision"):
        if not 0 < _number(values[name], name) < 1:
            raise ValueError(f"{name} is {values[name]}, not between 0 and 1")
    thresholds, counts = values["thresholds"], values["counts"]
    _exactly(thresholds, USES, "thresholds")
    for name, value in thresholds.items():
        if value is not None:
            _number(value, f"the threshold {name}")
    _exactly(counts, COUNTS, "counts")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"the count of {name} is {value!r:.60}")
    return Calibration(
        values["model"],
        values["fingerprint"],
        _curve(values["kind"], values["coefficients"]),
        values["prior"],
        values["precision"],
        thresholds,
        counts,
        values["data"],
        values["date"],
    )


def _curve(kind: Any, coefficients: Any) -> Curve:
    if kind == "logistic":
        _exactly(coefficients, ("slope", "intercept"), "coefficients")
        slope = _number(coefficients["slope"], "slope")
        if slope <= 0:
            raise ValueError(f"slope is {slope}, so a higher cosine would match less")
        return Logistic(slope, _number(coefficients["intercept"], "intercept"))
    if kind != "isotonic":
        raise ValueError(f"kind is {kind!r:.60}, not {' or '.join(KINDS)}")
    _exactly(coefficients, ("cosines", "probabilities"), "coefficients")
    rows = []
    for name in ("cosines", "probabilities"):
        given = coefficients[name]
        if not isinstance(given, list) or not given:
            raise ValueError(f"{name} is not a list of numbers")
        rows.append(tuple(_number(each, name) for each in given))
    cosines, probabilities = rows
    if len(cosines) != len(probabilities):
        raise ValueError(f"{len(cosines)} cosines with {len(probabilities)} probabilities")
    if np.any(np.diff(cosines) <= 0) or np.any(np.diff(probabilities) < 0):
        raise ValueError("its cosines or probabilities do not rise")
    if probabilities[0] < 0 or probabilities[-1] > 1:
        raise ValueError("a probability is not between 0 and 1")
    return Isotonic(cosines, probabilities)


def _exactly(values: Any, names: Sequence[str], what: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{what} is {type(values).__name__}, not an object")
    missing = [name for name in names if name not in values]
    unknown = [name for name in values if name not in names]
    if missing or unknown:
        told = f"has no {missing[0]!r}" if missing else f"has an unknown {unknown[0]!r:.60}"
        raise ValueError(f"{what} {told}")


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} is {value!r:.60}, not a finite number")
    if not abs(value) <= _LARGEST:  # so NaN, too; and an integer may be too large for a float
        raise ValueError(f"{what} is {value!r:.60}, not a finite number")
    return float(value)

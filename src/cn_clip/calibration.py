"""From cosine to probability of a match, and the thresholds below which nothing matches.

A calibration holds for one model in one precision, identified by its fingerprint, and is stored as
a small JSON file. ``cn_clip.eval.calibration.fit`` fits it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cn_clip.embedder import Embedder
from cn_clip.errors import UsageError
from cn_clip.files import MAX_TEXT, read_file
from cn_clip.format_version import FIELD, Format
from cn_clip.outputs import claim, own_file, starts_with
from cn_clip.publish import write_text
from cn_clip.text import read_json
from cn_clip.translation import N_, _, translate

CurveKind = Literal["logistic", "isotonic"]
CURVE_KINDS: tuple[CurveKind, ...] = ("logistic", "isotonic")
USES = (N_("search"), N_("labels"))
COUNTS = ("images", "texts", "pairs", "non_pairs")
_FORMAT = Format("calibration", 1)
_MAX_VALUE = 1e30  # of any number in the file: products of two stay finite
_REMEDY = N_("fit one with: cn-clip eval calibrate")


@dataclass(frozen=True, slots=True)
class Logistic:
    """``1 / (1 + exp(-(slope * cosine + intercept)))`` (Platt, 1999)."""

    slope: float
    intercept: float


@dataclass(frozen=True, slots=True)
class Isotonic:
    """Linear interpolation of ``probabilities`` at ``cosines``, constant beyond both ends."""

    cosines: tuple[float, ...]
    probabilities: tuple[float, ...]


Curve = Logistic | Isotonic


@dataclass(frozen=True, slots=True)
class Calibration:
    """A fitted curve and its thresholds, with the model and data they were fitted on.

    Attributes:
        model: name of the model, for display.
        fingerprint: ``Embedder.fingerprint`` of the model.
        curve: maps cosine to probability.
        prior: fraction of matching pairs that the probability assumes.
        precision: target precision of the results accepted by the thresholds.
        thresholds: cosine below which the top result is rejected, for ``search`` (a text against
            all images) and ``labels`` (an image against ten texts); None where no threshold
            reaches the precision.
        counts: images, texts, pairs and non-pairs that it was fitted on.
        data: digest of the images and texts.
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
    def kind(self) -> CurveKind:
        return "logistic" if isinstance(self.curve, Logistic) else "isotonic"


def probability(curve: Curve, cosines: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the probability of a match for cosines of any shape, float64 of the same shape."""
    cosines = np.asarray(cosines, np.float64)
    result: npt.NDArray[np.float64]
    if isinstance(curve, Isotonic):
        result = np.interp(cosines, curve.cosines, curve.probabilities)
    else:  # the logistic function as a tanh, which cannot overflow
        result = (1 + np.tanh((curve.slope * cosines + curve.intercept) / 2)) / 2
    return result


def check_model(calibration: Calibration, embedder: Embedder) -> None:
    """Check that a calibration was fitted on this model.

    A calibration of the float32 model that ``embedder`` is another precision or runtime of is
    accepted with a warning: cosines of the two are close, not equal.

    Raises:
        UsageError: it was fitted on another model.
    """
    if calibration.fingerprint == embedder.fingerprint:
        return
    if calibration.fingerprint != embedder.derived_from:
        raise UsageError(
            _(
                "the calibration is for {model!r} with fingerprint {fingerprint:.8}, but this is "
                "{name!r} with {embedder_fingerprint:.8} (weights, precision and preprocessing "
                "count); {remedy}",
                model=calibration.model,
                fingerprint=calibration.fingerprint,
                name=embedder.name,
                embedder_fingerprint=embedder.fingerprint,
                remedy=translate(_REMEDY),
            )
        )
    warnings.warn(
        _(
            "the calibration for {model!r} was fitted on the float32 model; verify with cn-clip "
            "eval calibrate",
            model=calibration.model,
        ),
        stacklevel=2,
    )


def claim_calibration(
    out: str | Path, *, inputs: Iterable[str | Path] = (), overwrite: bool = False
) -> Path:
    """Return ``out`` as a path if a calibration may be written there; nothing is written yet.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    own = starts_with(f'{{\n  "{FIELD}": "cn-clip {_FORMAT.name} '.encode())  # any version
    return claim(out, own_file("eval calibrate", own), inputs=inputs, overwrite=overwrite)


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file atomically."""
    values = {
        FIELD: str(_FORMAT),
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
    """Read the file; missing, unknown and out-of-range fields are refused.

    Raises:
        UsageError: the file is unreadable or not a calibration; the first reason is named.
    """
    try:
        values = read_json(read_file(path, MAX_TEXT))
    except OSError as error:
        raise UsageError(
            _(
                "{path} cannot be read: {reason}; {remedy}",
                path=path,
                reason=error.strerror,
                remedy=translate(_REMEDY),
            )
        ) from None
    except ValueError as error:  # not UTF-8, not JSON
        raise UsageError(
            _(
                "{path} is not a calibration ({error}); {remedy}",
                path=path,
                error=error,
                remedy=translate(_REMEDY),
            )
        ) from None
    if isinstance(values, dict):
        _FORMAT.check(values.get(FIELD), path, UsageError, _REMEDY)
    try:
        return _parse(values)
    except ValueError as error:
        raise UsageError(
            _(
                "{path} is not a calibration: {error}; {remedy}",
                path=path,
                error=error,
                remedy=translate(_REMEDY),
            )
        ) from None


def _parse(values: Any) -> Calibration:
    fields = [
        FIELD, "model", "fingerprint", "kind", "coefficients", "prior", "precision",
        "thresholds", "counts", "data", "date",
    ]  # fmt: skip
    _check_fields(values, fields, _("the file"))
    for name in ("model", "fingerprint", "data", "date"):
        if not isinstance(values[name], str) or not values[name]:
            raise ValueError(
                _("{name} is {value!r:.60}, not a string", name=name, value=values[name])
            )
    for name in ("prior", "precision"):
        if not 0 < _number(values[name], name) < 1:
            raise ValueError(
                _("{name} is {value}, not between 0 and 1", name=name, value=values[name])
            )
    thresholds, counts = values["thresholds"], values["counts"]
    _check_fields(thresholds, USES, "thresholds")
    for name, value in thresholds.items():
        if value is not None:
            _number(value, _("the threshold {name}", name=name))
    _check_fields(counts, COUNTS, "counts")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(_("the count of {name} is {value!r:.60}", name=name, value=value))
    return Calibration(
        values["model"],
        values["fingerprint"],
        _parse_curve(values["kind"], values["coefficients"]),
        values["prior"],
        values["precision"],
        thresholds,
        counts,
        values["data"],
        values["date"],
    )


def _parse_curve(kind: Any, coefficients: Any) -> Curve:
    if kind == "logistic":
        _check_fields(coefficients, ("slope", "intercept"), "coefficients")
        slope = _number(coefficients["slope"], "slope")
        if slope <= 0:
            raise ValueError(_("slope is {slope}, but must be positive", slope=slope))
        return Logistic(slope, _number(coefficients["intercept"], "intercept"))
    if kind != "isotonic":
        raise ValueError(
            _("kind is {kind!r:.60}, not {kinds}", kind=kind, kinds=_(" or ").join(CURVE_KINDS))
        )
    _check_fields(coefficients, ("cosines", "probabilities"), "coefficients")
    rows = []
    for name in ("cosines", "probabilities"):
        values = coefficients[name]
        if not isinstance(values, list) or not values:
            raise ValueError(_("{name} is not a list of numbers", name=name))
        rows.append(tuple(_number(value, name) for value in values))
    cosines, probabilities = rows
    if len(cosines) != len(probabilities):
        raise ValueError(
            _(
                "{cosine_count} cosines with {probability_count} probabilities",
                cosine_count=len(cosines),
                probability_count=len(probabilities),
            )
        )
    if np.any(np.diff(cosines) <= 0) or np.any(np.diff(probabilities) < 0):
        raise ValueError(_("its cosines or probabilities are not increasing"))
    if probabilities[0] < 0 or probabilities[-1] > 1:
        raise ValueError(_("a probability is not between 0 and 1"))
    return Isotonic(cosines, probabilities)


def _check_fields(values: Any, fields: Sequence[str], what: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(
            _("{what} is {value_type}, not an object", what=what, value_type=type(values).__name__)
        )
    missing = [name for name in fields if name not in values]
    unknown = [name for name in values if name not in fields]
    if missing or unknown:
        problem = (
            _("has no {missing!r}", missing=missing[0])
            if missing
            else _("has an unknown {unknown!r:.60}", unknown=unknown[0])
        )
        raise ValueError(f"{what} {problem}")


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(_("{what} is {value!r:.60}, not a finite number", what=what, value=value))
    if not abs(value) <= _MAX_VALUE:  # also NaN, and integers too large for a float
        raise ValueError(_("{what} is {value!r:.60}, not a finite number", what=what, value=value))
    return float(value)

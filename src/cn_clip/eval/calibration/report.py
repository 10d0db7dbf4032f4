"""HTML report of a calibration: reliability diagram, curve, thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from cn_clip.calibration import USES, Calibration, probability
from cn_clip.eval.calibration.fit import FIXED_CUTOFF, Bin, HeldOut
from cn_clip.eval.calibration.thresholds import ThresholdEffect
from cn_clip.html.charts import Point, circle, linear_scale, polyline, table
from cn_clip.html.page import page
from cn_clip.publish import write_text

_SIDE, _MARGIN = 320, 44  # pixels of a chart


def write_report(calibration: Calibration, held_out: HeldOut, path: Path) -> None:
    """Write the report."""
    counts = calibration.counts
    calibrated, fixed = held_out.calibrated, held_out.fixed
    cosines = np.linspace(-1, 1, 201)
    curve = zip(cosines.tolist(), probability(calibration.curve, cosines).tolist(), strict=True)
    parts = [
        f"<h1>Calibration of {escape(calibration.model)}</h1>",
        f"<p>Fitted on {counts['images']:,} images, {counts['texts']:,} texts and "
        f"{counts['pairs']:,} pairs; {calibration.kind} curve, for pairs of which "
        f"{calibration.prior:.0%} match. The scores below are of a calibration fitted on one half "
        "of the images, measured on the other half.</p>",
        "<h2>Reliability</h2>",
        "<p>Each dot is a fifteenth of the pairs, by weight. Below the diagonal the probability is "
        "too high, above it too low.</p>",
        reliability_diagram(calibrated.bins),
        table(
            ("", "calibrated", f"cosine ≥ {FIXED_CUTOFF}"),
            [
                ("expected calibration error", f"{calibrated.ece:.3f}", f"{fixed.ece:.3f}"),
                ("Brier score", f"{calibrated.brier:.3f}", f"{fixed.brier:.3f}"),
                ("accuracy", f"{calibrated.accuracy:.1%}", f"{fixed.accuracy:.1%}"),
            ],
        ),
        "<h2>Probability by cosine</h2>",
        _chart("cosine", "probability of a match", list(curve), (-1.0, 1.0)),
        "<h2>No match</h2>",
        f"<p>The thresholds aim at a precision of {calibration.precision:.0%} where half of the "
        "queries have no match.</p>",
        table(
            ("", "threshold", "precision", "accepted if a match exists", "rejected if none does"),
            [
                row
                for use in USES
                for row in (
                    _row(f"{use}, fitted", held_out.effects[use]),
                    _row(f"{use}, fixed", held_out.fixed_effects[use]),
                )
            ],
        ),
    ]
    write_text(path, page(f"Calibration: {calibration.model}", parts, "eval calibrate"))


def reliability_diagram(bins: Sequence[Bin]) -> str:
    """Return an SVG of the fraction of matches by predicted probability, with the diagonal."""
    points = [(b.mean, b.matching) for b in bins]
    return _chart("predicted probability", "fraction matching", points, (0.0, 1.0), dots=True)


def _chart(
    x_label: str,
    y_label: str,
    points: Sequence[Point],
    x_range: tuple[float, float],
    *,
    dots: bool = False,
) -> str:
    low, high = x_range
    to_pixels = linear_scale(((low, 0), (high, 1)), (_MARGIN, 10), (_SIDE, _SIDE))
    shapes = [
        polyline([to_pixels((low, 0)), to_pixels((high, 0))], stroke="var(--line)"),
        f'<text x="{_MARGIN + _SIDE / 2}" y="{_SIDE + 40}" text-anchor="middle">{x_label}</text>',
        f'<text x="12" y="{_SIDE / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {_SIDE / 2})">{y_label}</text>',
    ]
    for step in range(5):
        value = low + (high - low) * step / 4
        x, y = to_pixels((value, step / 4))
        shapes.append(
            f'<text x="{x:.0f}" y="{_SIDE + 24}" text-anchor="middle">{value:g}</text>'
            f'<text x="{_MARGIN - 4}" y="{y + 4:.0f}" text-anchor="end">{step / 4:g}</text>'
        )
    if dots:
        shapes.append(polyline([to_pixels((low, 0)), to_pixels((high, 1))], stroke="var(--line)"))
        shapes += [
            circle(to_pixels((x, y)), f"{x:.3f} predicted, {y:.3f} match", radius=4)
            for x, y in points
        ]
    shapes.append(polyline(map(to_pixels, points), options=' stroke-width="1.5"'))
    width, height = _MARGIN + _SIDE + 10, _SIDE + 46
    return f'<svg viewBox="0 0 {width} {height}" width="{width}">{"".join(shapes)}</svg>'


def _row(name: str, effect: ThresholdEffect) -> tuple[str, ...]:
    return (
        name,
        "none" if effect.threshold is None else f"{effect.threshold:.3f}",
        "none accepted" if effect.precision is None else f"{effect.precision:.1%}",
        f"{effect.acceptance:.1%}",
        f"{effect.rejection:.1%}",
    )

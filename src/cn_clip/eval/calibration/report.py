"""HTML report of a calibration: reliability diagram, curve, thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from cn_clip.calibration import Calibration, probability
from cn_clip.eval.calibration.fit import FIXED_CUTOFF, Bin, HeldOut
from cn_clip.html.charts import Point, circle, linear_scale, polyline, svg
from cn_clip.html.page import write_page
from cn_clip.translation import _

_SIDE, _MARGIN = 320, 44  # pixels of a chart


def write_report(calibration: Calibration, held_out: HeldOut, path: Path) -> None:
    """Write the report."""
    cosines = np.linspace(-1, 1, 201)
    curve = zip(cosines.tolist(), probability(calibration.curve, cosines).tolist(), strict=True)
    write_page(
        path,
        "eval/calibration/report.html",
        _("Calibration: {model}", model=calibration.model),
        _("eval calibrate"),
        calibration=calibration,
        held_out=held_out,
        cutoff=FIXED_CUTOFF,
        reliability=reliability_diagram(held_out.calibrated.bins),
        curve=_chart(_("cosine"), _("probability of a match"), list(curve), (-1.0, 1.0)),
    )


def reliability_diagram(bins: Sequence[Bin]) -> Markup:
    """Return an SVG of the fraction of matches by predicted probability, with the diagonal."""
    points = [(b.mean, b.matching) for b in bins]
    return _chart(_("predicted probability"), _("fraction matching"), points, (0.0, 1.0), dots=True)


def _chart(
    x_label: str,
    y_label: str,
    points: Sequence[Point],
    x_range: tuple[float, float],
    *,
    dots: bool = False,
) -> Markup:
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
            circle(
                to_pixels((x, y)),
                _("{predicted:.3f} predicted, {matching:.3f} match", predicted=x, matching=y),
                radius=4,
            )
            for x, y in points
        ]
    shapes.append(polyline(map(to_pixels, points), options=' stroke-width="1.5"'))
    return svg(_MARGIN + _SIDE + 10, _SIDE + 46, shapes)

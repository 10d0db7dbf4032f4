"""How far a calibration holds, as one page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from cn_clip.calibration import USES, Calibration, probability
from cn_clip.eval.calibration.fit import FIXED_CUTOFF, Bin, HeldOut
from cn_clip.eval.calibration.thresholds import Answered
from cn_clip.html.page import page
from cn_clip.publish import write_text

_SIDE, _EDGE = 320, 44  # pixels of a diagram and of its margin

Point = tuple[float, float]


def write_report(calibration: Calibration, held_out: HeldOut, path: Path) -> None:
    """Write the page: reliability diagram, the curve, and what the thresholds do."""
    counts = calibration.counts
    judged, fixed = held_out.calibrated, held_out.fixed
    cosines = np.linspace(-1, 1, 201)
    curve = zip(cosines.tolist(), probability(calibration.curve, cosines).tolist(), strict=True)
    parts = [
        f"<h1>What a cosine of {escape(calibration.model)} means</h1>",
        f"<p>Fitted on {counts['images']:,} pictures, {counts['texts']:,} texts and "
        f"{counts['pairs']:,} pairs; {calibration.kind}, for pairs of which "
        f"{calibration.prior:.0%} match. The figures below are of a fit on one half of the "
        "pictures, judged on the other half.</p>",
        "<h2>Reliability</h2>",
        "<p>Each dot is a fifteenth of the pairs, by weight: right of the line the probability is "
        "too high, left of it too low.</p>",
        reliability_diagram(judged.bins),
        _table(
            ("", "calibrated", f"cosine ≥ {FIXED_CUTOFF}"),
            [
                ("expected calibration error", f"{judged.ece:.3f}", f"{fixed.ece:.3f}"),
                ("Brier score", f"{judged.brier:.3f}", f"{fixed.brier:.3f}"),
                ("judged rightly", f"{judged.right:.1%}", f"{fixed.right:.1%}"),
            ],
        ),
        "<h2>Probability by cosine</h2>",
        _diagram("cosine", "probability of a match", list(curve), (-1.0, 1.0)),
        "<h2>Nothing here matches</h2>",
        f"<p>The thresholds aim at {calibration.precision:.0%} right answers, where half of the "
        "questions have none.</p>",
        _table(
            ("", "cosine", "answers that are right", "answered", "rightly told nothing"),
            [
                row
                for use in USES
                for row in (
                    _row(f"{use}, fitted", held_out.answers[use]),
                    _row(f"{use}, fixed", held_out.fixed_answers[use]),
                )
            ],
        ),
    ]
    write_text(path, page(f"Calibration: {calibration.model}", parts, "eval calibrate"))


def reliability_diagram(bins: Sequence[Bin]) -> str:
    """Return an SVG of the share of matches by the probability said, beside the diagonal."""
    points = [(each.mean, each.share) for each in bins]
    return _diagram("probability said", "share that match", points, (0.0, 1.0), dots=True)


def _diagram(
    x_name: str,
    y_name: str,
    points: Sequence[Point],
    span: tuple[float, float],
    *,
    dots: bool = False,
) -> str:
    low, high = span

    def place(x: float, y: float) -> Point:
        return _EDGE + (x - low) / (high - low) * _SIDE, 10 + (1 - y) * _SIDE

    marks = [
        f'<polyline points="{_line([place(low, 0), place(high, 0)])}" fill="none" '
        'stroke="var(--line)"/>',
        f'<text x="{_EDGE + _SIDE / 2}" y="{_SIDE + 40}" text-anchor="middle">{x_name}</text>',
        f'<text x="12" y="{_SIDE / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {_SIDE / 2})">{y_name}</text>',
    ]
    for step in range(5):
        x, y = place(low + (high - low) * step / 4, step / 4)
        marks.append(
            f'<text x="{x:.0f}" y="{_SIDE + 24}" text-anchor="middle">'
            f"{low + (high - low) * step / 4:g}</text>"
            f'<text x="{_EDGE - 4}" y="{y + 4:.0f}" text-anchor="end">{step / 4:g}</text>'
        )
    if dots:
        marks.append(
            f'<polyline points="{_line([place(low, 0), place(high, 1)])}" fill="none" '
            'stroke="var(--line)"/>'
        )
        for x, y in points:
            across, down = place(x, y)
            marks.append(
                f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="var(--bar)">'
                f"<title>{x:.3f} said, {y:.3f} match</title></circle>"
            )
    marks.append(
        f'<polyline points="{_line([place(*point) for point in points])}" fill="none" '
        'stroke="var(--bar)" stroke-width="1.5"/>'
    )
    size = f"{_EDGE + _SIDE + 10} {_SIDE + 46}"
    return f'<svg viewBox="0 0 {size}" width="{_EDGE + _SIDE + 10}">{"".join(marks)}</svg>'


def _line(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _row(name: str, answered: Answered) -> tuple[str, ...]:
    return (
        name,
        "none" if answered.threshold is None else f"{answered.threshold:.3f}",
        "no answer" if answered.precision is None else f"{answered.precision:.1%}",
        f"{answered.answered:.1%}",
        f"{answered.refused:.1%}",
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    lines = (
        f"<tr><td>{escape(first)}</td>"
        + "".join(f'<td class="number">{escape(each)}</td>' for each in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"

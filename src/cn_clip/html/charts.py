"""Line charts and histograms of HTML reports, as inline SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from html import escape

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from cn_clip.translation import _

Point = tuple[float, float]


def svg(width: float, height: float, shapes: Iterable[str], label: str = "") -> Markup:
    """Return shapes as an SVG of this size in pixels; ``label`` is for screen readers."""
    role = f' role="img" aria-label="{escape(label)}"' if label else ""
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" width="{width}"{role}>{"".join(shapes)}</svg>'
    )


def no_chart() -> Markup:
    """Return what is shown instead of a chart without data."""
    return Markup("<p>{}</p>").format(_("none"))


def polyline(points: Iterable[Point], *, stroke: str = "var(--bar)", options: str = "") -> str:
    """Return an SVG line through points in pixels; ``options`` are further SVG attributes."""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{line}" fill="none" stroke="{stroke}"{options}/>'


def circle(point: Point, title: str, *, radius: int = 3) -> str:
    """Return an SVG dot at a point in pixels, with a tooltip."""
    x, y = point
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="var(--bar)">'
        f"<title>{escape(title)}</title></circle>"
    )


def linear_scale(
    domain: tuple[Point, Point], corner: Point, size: tuple[float, float]
) -> Callable[[Point], Point]:
    """Return the function from data to pixels of a chart; y grows upwards.

    Args:
        domain: lowest and highest point of the data, each ``(x, y)``.
        corner: pixels of the chart's upper left corner.
        size: width and height of the chart in pixels.
    """
    (left, low), (right, high) = domain

    def to_pixels(point: Point) -> Point:
        x, y = point
        return (
            corner[0] + (x - left) / (right - left) * size[0],
            corner[1] + (high - y) / (high - low) * size[1],
        )

    return to_pixels


def histogram(counts: Counter[int], width: int, limit: int | None = None) -> Markup:
    """Return an SVG histogram with bins of ``width``; bins above ``limit`` are highlighted."""
    if not counts:
        return no_chart()
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[value // width] += count
    last = max(bins)
    if last > 60:  # wider bins rather than narrower bars
        return histogram(counts, width * math.ceil(last / 40), limit)
    largest, step, height = max(bins.values()), 14, 120
    marks = []
    for at in range(last + 1):
        bar = height * bins[at] / largest
        css_class = ' class="cut"' if limit is not None and at * width > limit else ""
        tooltip = _(
            "{low} to {high}: {count:,}",
            low=at * width,
            high=at * width + width - 1,
            count=bins[at],
        )
        marks.append(
            f'<rect{css_class} x="{at * step}" y="{height - bar:.1f}" width="{step - 2}" '
            f'height="{bar:.1f}"><title>{escape(tooltip)}</title></rect>'
        )
        if at % 5 == 0:
            marks.append(f'<text x="{at * step}" y="{height + 14}">{at * width}</text>')
    return svg((last + 1) * step + 40, height + 20, marks)


def overlaid_histograms(
    ours: npt.NDArray[np.int64], others: npt.NDArray[np.int64], edges: npt.NDArray[np.float64]
) -> Markup:
    """Return an SVG of two overlaid histograms, ours in colour, each normalised to sum 1, over the
    bins (``edges``) that are not empty; every 0.1 is labelled."""
    filled = np.flatnonzero(ours + others)
    if not len(filled):
        return no_chart()
    low, high = max(0, int(filled[0]) - 2), min(len(ours), int(filled[-1]) + 3)
    fractions = [counts[low:high] / max(1, counts.sum()) for counts in (others, ours)]
    largest = max(float(values.max()) for values in fractions)
    step, height = max(3, 600 // (high - low)), 120
    areas = [
        f'<polygon points="{_outline(values, step, height, largest)}" fill="{colour}" '
        f'fill-opacity=".5" stroke="{colour}"/>'
        for values, colour in zip(fractions, ("#8a8a8a", "var(--bar)"), strict=True)
    ]
    marks = [
        f'<text x="{(at - low) * step}" y="{height + 14}">{edges[at]:.1f}</text>'
        for at in range(low, high)
        if round(float(edges[at]) * 1000) % 100 == 0
    ]
    return svg((high - low) * step + 30, height + 20, areas + marks)


def _outline(values: npt.NDArray[np.float64], step: int, height: int, largest: float) -> str:
    points = [(0.0, float(height))]
    for at, value in enumerate(values.tolist()):
        points += [(at * step, height - height * value / largest)]
        points += [((at + 1) * step, height - height * value / largest)]
    points.append((float(len(values) * step), float(height)))
    return " ".join(f"{x:g},{y:.1f}" for x, y in points)

"""Line charts and histograms of HTML reports, as inline SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from cn_clip.translation import _

Point = tuple[float, float]
_SHRUNK = 0.7  # of the width, on a narrow screen
_LEFT = 64  # pixels left of a chart, for the numbers and the title


def svg(width: float, height: float, shapes: Iterable[str], label: str = "") -> Markup:
    """Return shapes as an SVG of this size in pixels; ``label`` is for screen readers.

    On a narrow screen it shrinks as long as its texts can be read, then it scrolls.
    """
    role = f' role="img" aria-label="{escape(label)}"' if label else ""
    return Markup(
        f'<div class="chart"><svg viewBox="0 0 {width} {height}" width="{width}"'
        f' style="min-width: {_SHRUNK * width:.0f}px"{role}>{"".join(shapes)}</svg></div>'
    )


def no_chart() -> Markup:
    """Return what is shown instead of a chart without data."""
    return Markup("<p>{}</p>").format(_("none"))


def polyline(points: Iterable[Point], *, stroke: str = "var(--bar)", options: str = "") -> str:
    """Return an SVG line through points in pixels; ``options`` are further SVG attributes."""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{line}" fill="none" stroke="{stroke}"{options}/>'


def circle(point: Point, title: str, *, radius: int = 3, hollow: bool = False) -> str:
    """Return an SVG dot at a point in pixels, with a tooltip; ``hollow`` is a ring."""
    x, y = point
    colours = 'fill="none" stroke="var(--bad)"' if hollow else 'fill="var(--bar)"'
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" {colours}>'
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


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of a chart: its range, its title with the unit, and the numbers at its ticks."""

    low: float
    high: float
    title: str
    ticks: Sequence[float]

    @classmethod
    def of(cls, low: float, high: float, title: str, count: int = 5) -> Axis:
        """Return an axis with about ``count`` round ticks, widened to the outer ones."""
        ticks = round_ticks(low, high, count)
        return cls(min(low, ticks[0]), max(high, ticks[-1]), title, ticks)


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` multiples of 1, 2 or 5 times a power of ten around a range."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.999 * rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def axes(x: Axis, y: Axis, corner: Point, size: tuple[float, float]) -> list[str]:
    """Return the SVG of two axes: lines across the chart, ticks with their numbers, titles.

    Args:
        x, y: the axes.
        corner: pixels of the chart's upper left corner.
        size: width and height of the chart in pixels.
    """
    left, top = corner
    right, bottom = left + size[0], top + size[1]
    to_pixels = linear_scale(((x.low, y.low), (x.high, y.high)), corner, size)
    shapes = []
    for value in y.ticks:
        _unused, at = to_pixels((x.low, value))
        shapes.append(
            f'<line x1="{left:g}" x2="{right:g}" y1="{at:.1f}" y2="{at:.1f}" '
            'stroke="var(--line)"/>'
            f'<text x="{left - 6:g}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>'
        )
    for value in x.ticks:
        at, _unused = to_pixels((value, y.low))
        shapes.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:g}" y2="{bottom + 4:g}" '
            'stroke="currentColor"/>'
            f'<text x="{at:.1f}" y="{bottom + 17:g}" text-anchor="middle">{number(value)}</text>'
        )
    middle = (top + bottom) / 2
    shapes.append(
        f'<text x="{(left + right) / 2:g}" y="{bottom + 34:g}" text-anchor="middle">'
        f"{escape(x.title)}</text>"
        f'<text x="12" y="{middle:g}" text-anchor="middle" transform="rotate(-90 12 {middle:g})">'
        f"{escape(y.title)}</text>"
    )
    return shapes


def number(value: float) -> str:
    """Return the number at a tick: ``1,200``, ``0.05``, ``2e-05``."""
    if value == round(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.6g}" if abs(value) >= 1e-3 else f"{value:.3g}"


def histogram(
    counts: Counter[int], width: int, x_title: str, y_title: str, limit: int | None = None
) -> Markup:
    """Return an SVG histogram; bins above ``limit`` are highlighted.

    Args:
        counts: of whole numbers from 0 on.
        width: of a bin, if this makes 8 to 60 bins; else narrower or wider ones are drawn.
        x_title: what the numbers are, with their unit.
        y_title: what is counted.
        limit: the largest number that is not highlighted.
    """
    if not counts:
        return no_chart()
    while max(counts) // width > 60:
        width *= 2
    while max(counts) // width < 8 and width > 1:
        width = math.ceil(width / 2)
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[value // width] += count
    last = max(bins)
    x = Axis(0, (last + 1) * width, x_title, round_ticks(0, (last + 1) * width, 8))
    x = replace(x, ticks=[tick for tick in x.ticks if tick <= x.high and tick == int(tick)])
    y = Axis.of(0, max(bins.values()), y_title, 4)
    y = replace(y, ticks=[tick for tick in y.ticks if tick == int(tick)])
    corner, size = (_LEFT, 10), (max(300, 14 * (last + 1)), 120)
    to_pixels = linear_scale(((x.low, y.low), (x.high, y.high)), corner, size)
    shapes = axes(x, y, corner, size)
    for at, count in sorted(bins.items()):
        left, top = to_pixels((at * width, count))
        right, bottom = to_pixels(((at + 1) * width, 0))
        css_class = ' class="cut"' if limit is not None and at * width > limit else ""
        tooltip = (
            _("{value}: {count:,}", value=at, count=count)
            if width == 1
            else _(
                "{low} to {high}: {count:,}",
                low=at * width,
                high=at * width + width - 1,
                count=count,
            )
        )
        shapes.append(
            f'<rect{css_class} x="{left + 1:.1f}" y="{top:.1f}" width="{right - left - 2:.1f}" '
            f'height="{bottom - top:.1f}"><title>{escape(tooltip)}</title></rect>'
        )
    return svg(_LEFT + size[0] + 20, 10 + size[1] + 40, shapes)


def overlaid_histograms(
    ours: npt.NDArray[np.int64], others: npt.NDArray[np.int64], edges: npt.NDArray[np.float64]
) -> Markup:
    """Return an SVG of two overlaid histograms of cosines, ours in colour, each normalised to sum
    1, over the bins (``edges``) that are not empty."""
    filled = np.flatnonzero(ours + others)
    if not len(filled):
        return no_chart()
    low, high = max(0, int(filled[0]) - 2), min(len(ours), int(filled[-1]) + 3)
    fractions = [counts[low:high] / max(1, counts.sum()) for counts in (others, ours)]
    largest = max(float(values.max()) for values in fractions)
    ends = float(edges[low]), float(edges[high])
    ticks = [tick for tick in round_ticks(*ends, 9) if ends[0] <= tick <= ends[1]]
    x = Axis(*ends, _("cosine"), ticks)
    y = Axis.of(0, 100 * largest, _("share, %"), 4)
    corner, size = (_LEFT, 10), (600, 120)
    to_pixels = linear_scale(((x.low, y.low), (x.high, y.high)), corner, size)
    shapes = axes(x, y, corner, size)
    for values, colour in zip(fractions, ("#8a8a8a", "var(--bar)"), strict=True):
        points = _outline(edges[low : high + 1], 100 * values)
        outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(to_pixels, points))
        shapes.append(
            f'<polygon points="{outline}" fill="{colour}" fill-opacity=".5" stroke="{colour}"/>'
        )
    return svg(_LEFT + size[0] + 20, 10 + size[1] + 40, shapes)


def _outline(edges: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> list[Point]:
    """Return the outline of a histogram: up and down at every edge."""
    points = [(float(edges[0]), 0.0)]
    for at, value in enumerate(values.tolist()):
        points += [(float(edges[at]), value), (float(edges[at + 1]), value)]
    return [*points, (float(edges[-1]), 0.0)]

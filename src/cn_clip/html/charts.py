"""Tables and line charts of HTML reports, as HTML and inline SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

Point = tuple[float, float]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the cells after the first are right-aligned numbers.

    Args:
        headings: plain text.
        rows: cells as HTML.
    """
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr><td>{first}</td>"
        + "".join(f'<td class="number">{cell}</td>' for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f'<div style="overflow-x: auto"><table><tr>{head}</tr>{body}</table></div>'


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

"""Parts of a self-contained HTML report: frame, images, histograms."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Iterable
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cn_clip.image.decode import read_image
from cn_clip.outputs import claim, own_file, starts_with
from cn_clip.text import path_text

_THUMBNAIL_SIDE = 128  # pixels of the longer side

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4a7fb5; --bad: #c0392b; }
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .75rem .25rem 0; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.bad { color: var(--bad); font-weight: 600; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { max-width: 100%; } figcaption { font-size: .85rem;
  overflow-wrap: anywhere; } li { overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } svg rect { fill: var(--bar); }
svg rect.cut { fill: var(--bad); } svg text { fill: currentColor; font-size: 11px; }
"""


def page(title: str, parts: Iterable[str], command: str) -> str:
    """Return an HTML page of HTML parts; it records the command that wrote it."""
    return (
        f'{_start(command)}<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(path_text(title))}</title><style>{STYLE}</style></head><body>\n"
        + path_text("\n".join(parts))  # file names may be invalid Unicode
        + "\n</body></html>\n"
    )


def claim_page(
    path: str | Path, command: str, *, option: str = "--report", inputs: Iterable[str | Path] = ()
) -> Path:
    """Check that a command may write its report to ``path``, without touching it. Return the path.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    own = own_file(command, starts_with(_start(command).encode()))
    return claim(path, own, option=option, inputs=inputs)


def _start(command: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head>'
        f'<meta name="generator" content="cn-clip {command}">'
    )


def image_grid(images: Iterable[tuple[str, str]]) -> str:
    """Return a grid of (image URL, caption as HTML)."""
    figures = (
        f'<figure><img src="{url}" alt=""><figcaption>{caption}</figcaption></figure>'
        for url, caption in images
    )
    return f'<div class="sheet">{"".join(figures)}</div>'


def histogram(counts: Counter[int], width: int, limit: int | None = None) -> str:
    """Return an SVG histogram with bins of ``width``; bins above ``limit`` are highlighted."""
    if not counts:
        return "<p>none</p>"
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
        tooltip = f"{at * width} to {at * width + width - 1}: {bins[at]:,}"
        marks.append(
            f'<rect{css_class} x="{at * step}" y="{height - bar:.1f}" width="{step - 2}" '
            f'height="{bar:.1f}"><title>{tooltip}</title></rect>'
        )
        if at % 5 == 0:
            marks.append(f'<text x="{at * step}" y="{height + 14}">{at * width}</text>')
    size = f"{(last + 1) * step + 40} {height + 20}"
    return f'<svg viewBox="0 0 {size}" width="{(last + 1) * step + 40}">{"".join(marks)}</svg>'


def overlaid_histograms(
    ours: npt.NDArray[np.int64], others: npt.NDArray[np.int64], edges: npt.NDArray[np.float64]
) -> str:
    """Return an SVG of two overlaid histograms, ours in colour, each normalised to sum 1, over the
    bins (``edges``) that are not empty; every 0.1 is labelled."""
    filled = np.flatnonzero(ours + others)
    if not len(filled):
        return "<p>none</p>"
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
    width = (high - low) * step + 30
    return (
        f'<svg viewBox="0 0 {width} {height + 20}" width="{width}">{"".join(areas + marks)}</svg>'
    )


def _outline(values: npt.NDArray[np.float64], step: int, height: int, largest: float) -> str:
    points = [(0.0, float(height))]
    for at, value in enumerate(values.tolist()):
        points += [(at * step, height - height * value / largest)]
        points += [((at + 1) * step, height - height * value / largest)]
    points.append((float(len(values) * step), float(height)))
    return " ".join(f"{x:g},{y:.1f}" for x, y in points)


def thumbnail(content: bytes) -> bytes:
    """Return an image as a small JPEG, with transparent pixels white."""
    image = read_image(content, background="white")
    if image.mode != "RGB":
        image = image.convert("RGB")  # convert("RGB") copies
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def data_uri(jpeg: bytes) -> str:
    """Return a JPEG as a data: URI."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"

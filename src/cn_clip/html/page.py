"""Pieces of a page that needs nothing beside it: frame, pictures, histograms."""

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
from cn_clip.publish import begins, claim, file_by
from cn_clip.text import path_text

_THUMBNAIL = 128  # pixels of the longer side

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
    """Return a whole page around its parts, which are HTML; it names the command that wrote it."""
    return (
        f'{_beginning(command)}<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(path_text(title))}</title><style>{STYLE}</style></head><body>\n"
        + path_text("\n".join(parts))  # captions are valid already; names of files may not be
        + "\n</body></html>\n"
    )


def claim_page(
    path: str | Path, command: str, *, option: str = "--report", inputs: Iterable[str | Path] = ()
) -> Path:
    """Check that a command may write its page there; nothing is touched. Return it as a path.

    Raises:
        UsageError: see ``publish.claim``.
    """
    own = file_by(command, begins(_beginning(command).encode()))
    return claim(path, own, option=option, inputs=inputs)


def _beginning(command: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head>'
        f'<meta name="generator" content="cn-clip {command}">'
    )


def sheet(pictures: Iterable[tuple[str, str]]) -> str:
    """Return pictures, (address, caption as HTML) each, as a grid."""
    figures = (
        f'<figure><img src="{address}" alt=""><figcaption>{caption}</figcaption></figure>'
        for address, caption in pictures
    )
    return f'<div class="sheet">{"".join(figures)}</div>'


def histogram(counts: Counter[int], width: int, limit: int | None = None) -> str:
    """Return an SVG of counts in bins of a width; bins above ``limit`` are marked."""
    if not counts:
        return "<p>none</p>"
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[value // width] += count
    last = max(bins)
    if last > 60:  # wider bins rather than narrower bars
        return histogram(counts, width * math.ceil(last / 40), limit)
    most, step, tall = max(bins.values()), 14, 120
    marks = []
    for at in range(last + 1):
        high = tall * bins[at] / most
        kind = ' class="cut"' if limit is not None and at * width > limit else ""
        told = f"{at * width} to {at * width + width - 1}: {bins[at]:,}"
        marks.append(
            f'<rect{kind} x="{at * step}" y="{tall - high:.1f}" width="{step - 2}" '
            f'height="{high:.1f}"><title>{told}</title></rect>'
        )
        if at % 5 == 0:
            marks.append(f'<text x="{at * step}" y="{tall + 14}">{at * width}</text>')
    size = f"{(last + 1) * step + 40} {tall + 20}"
    return f'<svg viewBox="0 0 {size}" width="{(last + 1) * step + 40}">{"".join(marks)}</svg>'


def overlaid(
    ours: npt.NDArray[np.int64], others: npt.NDArray[np.int64], edges: npt.NDArray[np.float64]
) -> str:
    """Return an SVG of two histograms over each other, ours in colour, each as shares of its own
    counts, in the part of the bins' ``edges`` that they fill; every tenth is marked."""
    filled = np.flatnonzero(ours + others)
    if not len(filled):
        return "<p>none</p>"
    low, high = max(0, int(filled[0]) - 2), min(len(ours), int(filled[-1]) + 3)
    shares = [each[low:high] / max(1, each.sum()) for each in (others, ours)]
    most = max(float(each.max()) for each in shares)
    step, tall = max(3, 600 // (high - low)), 120
    areas = [
        f'<polygon points="{_outline(share, step, tall, most)}" fill="{colour}" '
        f'fill-opacity=".5" stroke="{colour}"/>'
        for share, colour in zip(shares, ("#8a8a8a", "var(--bar)"), strict=True)
    ]
    marks = [
        f'<text x="{(at - low) * step}" y="{tall + 14}">{edges[at]:.1f}</text>'
        for at in range(low, high)
        if round(float(edges[at]) * 1000) % 100 == 0
    ]
    width = (high - low) * step + 30
    return f'<svg viewBox="0 0 {width} {tall + 20}" width="{width}">{"".join(areas + marks)}</svg>'


def _outline(shares: npt.NDArray[np.float64], step: int, tall: int, most: float) -> str:
    points = [(0.0, float(tall))]
    for at, share in enumerate(shares.tolist()):
        points += [(at * step, tall - tall * share / most)]
        points += [((at + 1) * step, tall - tall * share / most)]
    points.append((float(len(shares) * step), float(tall)))
    return " ".join(f"{x:g},{y:.1f}" for x, y in points)


def thumbnail(content: bytes) -> bytes:
    """Return a picture as a small JPEG, transparent pixels white."""
    image = read_image(content, background="white")
    if image.mode != "RGB":
        image = image.convert("RGB")  # of its own mode, it would be a copy
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def data_uri(jpeg: bytes) -> str:
    """Return a JPEG as an address that a page can hold in itself."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"

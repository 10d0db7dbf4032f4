"""What ``data check`` found, as one page that needs nothing beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from html import escape
from pathlib import Path

from cn_clip.data.check import KINDS, Checked, data_uri, thumbnail
from cn_clip.data.pair import Source
from cn_clip.errors import CNClipError
from cn_clip.publish import published

_SHOWN = 50  # problems of a kind on the page
_PICTURED = 12  # of them with their picture

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


def write_report(found: Checked, source: Source, path: Path) -> None:
    """Write the page: counts, histograms, pairs drawn at random, and the problems one by one."""
    verdict = (
        "Nothing was found that makes it unfit for training."
        if found.fit
        else '<span class="bad">It has rows that cannot be trained on.</span>'
    )
    parts = [
        f"<h1>{escape(found.source)}</h1>",
        f"<p>{found.pairs:,} pairs of {found.images:,} pictures and {found.captions:,} captions. "
        f"{verdict}</p>",
        _summary(found),
        "<h2>Length of captions, in tokens</h2>",
        histogram(found.lengths, 4, found.context_length),
        "<h2>Shorter side of pictures, in pixels</h2>",
        histogram(found.sides, 64),
        "<h2>Languages</h2>",
        _table((name, count) for name, count in found.languages.most_common()),
        "<h2>Pairs drawn at random</h2>",
        sheet((data_uri(jpeg), escape(caption)) for caption, jpeg in found.sheet),
        *(_problems(kind, found, source) for kind in KINDS if found.counts[kind]),
    ]
    with published(path) as temporary:
        temporary.write_text(page(found.source, parts), encoding="utf-8")


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole page around its parts, which are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
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


def _summary(found: Checked) -> str:
    rows = []
    for kind, (unfit, meaning) in KINDS.items():
        count = found.counts[kind]
        bad = ' class="bad"' if unfit and count else ""
        rows.append(f'<tr><td{bad}>{meaning}</td><td class="number">{count:,}</td></tr>')
    return f"<table>{''.join(rows)}</table>"


def _table(rows: Iterable[tuple[str, int]]) -> str:
    cells = (f'<tr><td>{escape(a)}</td><td class="number">{b:,}</td></tr>' for a, b in rows)
    return f"<table>{''.join(cells)}</table>"


def _problems(kind: str, found: Checked, source: Source) -> str:
    problems = [problem for problem in found.problems if problem.kind == kind]
    items = "".join(f"<li>{escape(problem.text)}</li>" for problem in problems[:_SHOWN])
    left = found.counts[kind] - _SHOWN
    more = f"<p>and {left:,} more</p>" if left > 0 else ""
    pictures = []
    if kind in ("same picture", "same caption", "pair", "small"):
        for problem in problems[:_PICTURED]:
            try:
                jpeg = thumbnail(source.image(problem.index or 0))
                pictures.append((data_uri(jpeg), escape(source.row(problem.index or 0).text)))
            except CNClipError:
                continue
    meaning = KINDS[kind][1]
    return f"<h2>{meaning[0].upper()}{meaning[1:]}</h2><ul>{items}</ul>{more}{sheet(pictures)}"

"""What ``data check`` found, as one page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from cn_clip.data.curate.check import KINDS, Checked
from cn_clip.data.sources.base import Source
from cn_clip.errors import CNClipError
from cn_clip.html.page import data_uri, histogram, page, sheet, thumbnail
from cn_clip.publish import write_text

_SHOWN = 50  # problems of a kind on the page
_PICTURED = 12  # of them with their picture


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
    write_text(path, page(found.source, parts, "data check"))


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

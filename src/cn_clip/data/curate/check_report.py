"""The HTML report of ``data check``, one self-contained page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from cn_clip.data.curate.check_result import PROBLEM_KINDS, CheckResult
from cn_clip.data.sources.base import Source
from cn_clip.errors import CNClipError
from cn_clip.html.page import data_uri, histogram, image_grid, page, thumbnail
from cn_clip.publish import write_text

_MAX_SHOWN = 50  # problems listed of each kind
_MAX_IMAGES = 12  # problems shown with their image


def write_report(result: CheckResult, source: Source, path: Path) -> None:
    """Write the report: counts, histograms, random pairs, and the problems."""
    verdict = (
        "No problem makes it unfit for training."
        if result.fit
        else '<span class="bad">Some of its rows cannot be trained on.</span>'
    )
    parts = [
        f"<h1>{escape(result.source)}</h1>",
        f"<p>{result.pairs:,} pairs of {result.images:,} images and {result.captions:,} captions. "
        f"{verdict}</p>",
        _summary(result),
        "<h2>Caption length in tokens</h2>",
        histogram(result.lengths, 4, result.context_length),
        "<h2>Shorter image side in pixels</h2>",
        histogram(result.sides, 64),
        "<h2>Languages</h2>",
        _table((name, count) for name, count in result.languages.most_common()),
        "<h2>Random pairs</h2>",
        image_grid((data_uri(jpeg), escape(caption)) for caption, jpeg in result.samples),
        *(_problems(kind, result, source) for kind in PROBLEM_KINDS if result.counts[kind]),
    ]
    write_text(path, page(result.source, parts, "data check"))


def _summary(result: CheckResult) -> str:
    rows = []
    for kind, (unfit, meaning) in PROBLEM_KINDS.items():
        count = result.counts[kind]
        bad = ' class="bad"' if unfit and count else ""
        rows.append(f'<tr><td{bad}>{meaning}</td><td class="number">{count:,}</td></tr>')
    return f"<table>{''.join(rows)}</table>"


def _table(rows: Iterable[tuple[str, int]]) -> str:
    cells = (f'<tr><td>{escape(a)}</td><td class="number">{b:,}</td></tr>' for a, b in rows)
    return f"<table>{''.join(cells)}</table>"


def _problems(kind: str, result: CheckResult, source: Source) -> str:
    problems = [problem for problem in result.problems if problem.kind == kind]
    items = "".join(f"<li>{escape(problem.text)}</li>" for problem in problems[:_MAX_SHOWN])
    not_shown = result.counts[kind] - _MAX_SHOWN
    more = f"<p>and {not_shown:,} more</p>" if not_shown > 0 else ""
    images = []
    if kind in ("same image", "same caption", "pair", "small"):
        for problem in problems[:_MAX_IMAGES]:
            try:
                jpeg = thumbnail(source.image(problem.index or 0))
                images.append((data_uri(jpeg), escape(source.row(problem.index or 0).text)))
            except CNClipError:
                continue
    meaning = PROBLEM_KINDS[kind][1]
    return f"<h2>{meaning[0].upper()}{meaning[1:]}</h2><ul>{items}</ul>{more}{image_grid(images)}"

"""The HTML report of ``data check``, one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cn_clip.data.curate.check_result import PROBLEM_KINDS, CheckResult
from cn_clip.data.sources.base import Source
from cn_clip.errors import CNClipError
from cn_clip.html.page import thumbnail, write_page
from cn_clip.translation import _

_MAX_SHOWN = 50  # problems listed of each kind
_MAX_IMAGES = 12  # problems shown with their image


def write_report(result: CheckResult, source: Source, path: Path) -> None:
    """Write the report: counts, histograms, random pairs, and the problems."""
    write_page(
        path,
        "data/curate/check_report.html",
        result.source,
        _("data check"),
        result=result,
        kinds=PROBLEM_KINDS,
        max_shown=_MAX_SHOWN,
        images=lambda kind: _images(kind, result, source),
    )


def _images(kind: str, result: CheckResult, source: Source) -> Iterator[tuple[str, bytes]]:
    """Yield (caption, JPEG thumbnail) of the first problems of a kind, if it is about images."""
    if kind in ("same image", "same caption", "pair", "small"):
        problems = [problem for problem in result.problems if problem.kind == kind]
        for index in (problem.index or 0 for problem in problems[:_MAX_IMAGES]):
            try:
                yield source.row(index).text, thumbnail(source.image(index))
            except CNClipError:
                continue

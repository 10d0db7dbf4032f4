"""The HTML report of a run, as one self-contained file: scores, curves, retrieved images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np

from cn_clip.arrays import read_npz
from cn_clip.errors import CNClipError, DataError
from cn_clip.eval.dataset import EvalSet
from cn_clip.html.charts import Point, circle, linear_scale, polyline, table
from cn_clip.html.page import data_uri, image_grid, page, thumbnail
from cn_clip.publish import atomic_file
from cn_clip.train.recipe.schema import Recipe
from cn_clip.train.run.events import (
    FINAL,
    EndEvent,
    MixturesEvent,
    RunEvent,
    ScoreEvent,
    StageEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
    interpolated,
)
from cn_clip.train.run.log import read_events
from cn_clip.train.validation import Vectors

_QUERIES, _TOP_K = 8, 5  # queries in the report, and images of each
_MAX_POINTS = 600  # of a curve
_WIDTH, _HEIGHT, _MARGIN = 860, 220, 64


def write_report(
    folder: Path, recipe: Recipe, validation: EvalSet | None
) -> list[tuple[str, float]]:
    """Write ``report.html`` into a run's folder.

    Returns:
        The scores at its top, as (name, mean recall).
    """
    events = read_events(folder)
    scores = headline(events, recipe)
    steps = [event for event in events if isinstance(event, StepEvent)]
    marks = [(e.total, e.stage) for e in events if isinstance(e, StageEvent) and e.step == 0]
    scored = [e for e in events if isinstance(e, ScoreEvent) and e.stage != FINAL]
    parts = [
        f"<h1>{escape(recipe.name)}</h1>",
        _summary(events, recipe),
        "<h2>Mean recall on the validation pairs</h2>",
        _scores(events, recipe) if scores else "<p>No validation pairs.</p>",
        curve(
            [(e.total, 100 * e.mean_recall) for e in scored],
            marks,
            "mean recall, %",
            dots=True,
        ),
        *_mixtures(events),
        "<h2>Loss</h2>",
        curve([(e.total, e.mean_loss) for e in steps], marks, "loss"),
        "<h2>Learning rate</h2>",
        curve([(e.total, e.lr) for e in steps], marks, "learning rate"),
        "<h2>Logit scale</h2>",
        curve([(e.total, e.logit_scale) for e in steps], marks, "factor on the cosine"),
        *_retrievals(folder, validation),
        "<h2>Initial weights</h2>",
        _listed(line for e in events if isinstance(e, StartEvent) for line in e.origins),
        *(f'<p class="bad">{escape(e.text)}</p>' for e in events if isinstance(e, WarningEvent)),
        "<h2>Recipe</h2>",
        f"<pre>{escape(recipe.to_toml())}</pre>",
    ]
    with atomic_file(folder / "report.html") as path:
        path.write_text(page(f"Training: {recipe.name}", parts, "train"), encoding="utf-8")
    return scores


def headline(events: Sequence[RunEvent], recipe: Recipe) -> list[tuple[str, float]]:
    """Return the scores before training, of each stage (best and interpolated), and final."""
    return [(name, event.mean_recall) for name, event in _chosen(events, recipe)]


def _chosen(events: Sequence[RunEvent], recipe: Recipe) -> list[tuple[str, ScoreEvent]]:
    scored = [event for event in events if isinstance(event, ScoreEvent)]
    chosen = [("before", event) for event in scored if event.total == 0]
    best = chosen[0][1] if chosen else None
    for stage in recipe.stages:
        of_stage = [event for event in scored if event.stage == stage.name and event.total]
        for event in of_stage:
            if best is None or event.mean_recall > best.mean_recall:
                best = event
        if of_stage and best is not None:
            chosen.append((stage.name, best))
        # A stage that was made longer has several; the next stage starts from the last.
        for event in [e for e in scored if e.stage == interpolated(stage.name)][-1:]:
            best = event
            chosen.append((event.stage, event))
    chosen += [("final", event) for event in scored if event.stage == FINAL][-1:]
    return chosen


def curve(
    points: Sequence[Point],
    marks: Sequence[tuple[float, str]],
    label: str,
    dots: bool = False,
    *,
    second: Sequence[Point] = (),
    x_label: str = "step",
) -> str:
    """Return an SVG of a curve.

    Args:
        points: (x, y); a ``y`` that is not a finite number is left out.
        marks: (x, text) of vertical lines, such as the starts of stages.
        label: the y axis, for screen readers.
        dots: draw the points.
        second: another curve, drawn dashed.
        x_label: the x axis.
    """
    points = [(x, y) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]
    if not points:
        return "<p>none</p>"
    points = points[:: max(1, len(points) // _MAX_POINTS)]
    xs, ys = zip(*points, *second, strict=True)
    left, right = 0.0, max(1.0, max(xs))
    low, high = min(ys), max(ys)
    if high == low:
        low, high = low - 0.5, high + 0.5

    to_pixels = linear_scale(
        ((left, low), (right, high)), (_MARGIN, 10), (_WIDTH - _MARGIN - 10, _HEIGHT - 40)
    )
    shapes = []
    for curve_points, dashes in ((points, ""), (second, ' stroke-dasharray="6 4"')):
        if curve_points:
            options = f' stroke-width="1.5"{dashes}'
            shapes.append(polyline(map(to_pixels, curve_points), options=options))
    for value in (low, (low + high) / 2, high):
        _, y = to_pixels((0, value))
        shapes.append(
            f'<line x1="{_MARGIN}" x2="{_WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="var(--line)"/>'
            f'<text x="{_MARGIN - 4}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>'
        )
    for at, name in marks:
        x, _ = to_pixels((at, low))
        shapes.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{_HEIGHT - 28}" stroke="currentColor" '
            'stroke-dasharray="3 3"/>'
            f'<text x="{x + 4:.1f}" y="{_HEIGHT - 16}">{escape(name)}</text>'
        )
    if dots:
        for point in (*points, *second):
            title = f"{x_label} {_short(point[0])}: {_short(point[1])}"
            shapes.append(circle(to_pixels(point), title))
    shapes.append(
        f'<text x="{_WIDTH - 10}" y="{_HEIGHT - 2}" text-anchor="end">'
        f"{x_label} {_short(right)}</text>"
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" '
        f'aria-label="{escape(label)}">{"".join(shapes)}</svg>'
    )


def _summary(events: Sequence[RunEvent], recipe: Recipe) -> str:
    start = next((e for e in events if isinstance(e, StartEvent)), None)
    end = next((e for e in events if isinstance(e, EndEvent)), None)
    sentences = []
    if start is not None:
        sentences.append(
            f"{escape(start.model)}, {start.parameters / 1e6:,.1f} M parameters, "
            f"{start.pairs:,} training pairs, on {escape(start.device)}, "
            f"{start.processes} process(es), {recipe.machine.precision}."
        )
    if end is not None:
        sentences.append(
            f"{end.total:,} steps; {end.seconds / 60:,.1f} minutes since the last start."
        )
    return f"<p>{' '.join(sentences)}</p>"


def _scores(events: Sequence[RunEvent], recipe: Recipe) -> str:
    chosen = _chosen(events, recipe)
    first = chosen[0][1].mean_recall
    columns = ("t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10")
    heads = (
        "",
        "mean recall",
        "gain",
        *(
            c.replace("_r", " R@").replace("t2i", "text→image").replace("i2t", "image→text")
            for c in columns
        ),
    )
    rows = []
    for name, event in chosen:
        recalls = (getattr(event, column) for column in columns)
        values = [event.mean_recall, event.mean_recall - first, *recalls]
        shown = [f"{100 * n:.1f}" for n in values]
        shown[1] = "" if name == "before" else f"{100 * values[1]:+.1f}"
        rows.append([escape(name), *shown])
    return table(heads, rows)


def mixtures(events: Sequence[RunEvent]) -> list[MixturesEvent]:
    """Return the interpolated weights that were scored, of each stage the last time."""
    scored = (event for event in events if isinstance(event, MixturesEvent) and event.mixtures)
    return list({event.stage: event for event in scored if _has_kept(event) is not None}.values())


def _has_kept(event: MixturesEvent) -> bool | None:
    """Return whether all scores include the kept pairs; None if only some do, in a damaged line."""
    kept = {score.kept is not None for score in event.mixtures}
    return kept.pop() if len(kept) == 1 else None


def _mixtures(events: Sequence[RunEvent]) -> Iterator[str]:
    """Yield a curve and a table of the scores of the interpolated weights of each stage."""
    for sweep in mixtures(events):
        rows, weight = sweep.mixtures, sweep.weight
        first, has_kept = rows[0], _has_kept(sweep)
        yield f"<h2>Interpolated weights of stage {escape(sweep.stage)}</h2>"
        yield (
            "<p>Mean recall of the initial and the new weights of the stage, interpolated, "
            "in points above the initial weights: on the validation pairs"
            + (" (solid), and on the kept pairs (dashed)" if has_kept else "")
            + f". Chosen weight of the new weights: {weight:g}.</p>"
        )
        yield curve(
            [(row.weight, _points(row.score, first.score)) for row in rows],
            [(weight, "chosen")],
            "points of mean recall",
            dots=True,
            second=[(r.weight, _points(r.kept, first.kept)) for r in rows if has_kept],
            x_label="weight",
        )
        heads = ("weight", "validation", "kept") if has_kept else ("weight", "validation")
        yield table(
            heads,
            (
                [
                    f"{row.weight:g}" + (", chosen" if row.weight == weight else ""),
                    *(f"{100 * value:.1f}" for value in (row.score, row.kept) if value is not None),
                ]
                for row in rows
            ),
        )


def _points(recall: float | None, first: float | None) -> float:
    """Return the difference of two mean recalls in points."""
    assert recall is not None and first is not None
    return round(100 * (recall - first), 2)


def _retrievals(folder: Path, validation: EvalSet | None) -> list[str]:
    """Return the top images of some validation texts, before and after training."""
    try:
        before, after = (_embeddings(folder / f"{name}.npz") for name in ("before", "after"))
    except DataError:
        return []
    if validation is None:
        return []
    count = len(validation.texts)
    chosen = sorted({round(n * (count - 1) / max(1, _QUERIES - 1)) for n in range(_QUERIES)})
    parts = ["<h2>Retrieved images</h2>"]
    for text in chosen:
        parts.append(f"<h3>{escape(validation.texts[text])}</h3>")
        correct = set(validation.pairs[validation.pairs[:, 1] == text, 0].tolist())
        for name, (images, texts) in (("before", before), ("after", after)):
            parts.append(f"<p>{name}</p>")
            parts.append(image_grid(_top_images(images, texts[text], correct, validation)))
    return parts


def _embeddings(path: Path) -> tuple[Vectors, Vectors]:
    arrays = read_npz(path, ("images", "texts"))
    return arrays["images"].astype(np.float32), arrays["texts"].astype(np.float32)


def _top_images(
    images: Vectors, text: Vectors, correct: set[int], validation: EvalSet
) -> Iterable[tuple[str, str]]:
    cosines = images @ text
    for image in np.argsort(-cosines, kind="stable")[:_TOP_K].tolist():
        try:
            uri = data_uri(thumbnail(validation.image_bytes(image)))
        except CNClipError:
            continue
        mark = " ✓" if image in correct else ""
        yield uri, f"{cosines[image]:.3f}{mark}"


def _listed(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(str(line))}</li>' for line in lines)}</ul>"


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"

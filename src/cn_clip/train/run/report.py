"""The HTML report of a run, as one self-contained file: scores, curves, retrieved images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
from markupsafe import Markup

from cn_clip.arrays import read_npz
from cn_clip.errors import CNClipError, DataError
from cn_clip.eval.dataset import EvalSet
from cn_clip.html.charts import (
    Axis,
    Point,
    axes,
    circle,
    linear_scale,
    no_chart,
    number,
    polyline,
    round_ticks,
    svg,
)
from cn_clip.html.page import thumbnail, write_page
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
from cn_clip.translation import N_, _, translate

_QUERIES, _TOP_K = 8, 5  # queries in the report, and images of each
_MAX_POINTS = 600  # of a curve
_SCORE_NAMES = {"before": N_("before training"), FINAL: N_("final weights")}
_WIDTH, _HEIGHT, _MARGIN = 860, 250, 64


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
    mixed = [e for e in scored if e.stage.endswith(interpolated(""))]
    recalls = [(e.total, 100 * e.mean_recall) for e in scored if e not in mixed]
    after_mixing = [(e.total, 100 * e.mean_recall, _("interpolated")) for e in mixed]
    write_page(
        folder / "report.html",
        "train/run/report.html",
        _("Training: {name}", name=recipe.name),
        "train",
        recipe=recipe,
        first=next((e for e in events if isinstance(e, StartEvent)), None),
        end=next((e for e in events if isinstance(e, EndEvent)), None),
        scores=_chosen(events, recipe),
        score_name=score_name,
        recall_curve=curve(recalls, marks, _("mean recall, %"), dots=True, extra=after_mixing),
        mixtures=[(sweep, _mixture_curve(sweep)) for sweep in mixtures(events)],
        step_curves={
            _("Loss"): curve([(e.total, e.mean_loss) for e in steps], marks, _("training loss")),
            _("Learning rate"): curve([(e.total, e.lr) for e in steps], marks, _("learning rate")),
            _("Logit scale"): curve(
                [(e.total, e.logit_scale) for e in steps], marks, _("factor on the cosine")
            ),
        },
        retrievals=_retrievals(folder, validation),
        origins=[line for e in events if isinstance(e, StartEvent) for line in e.origins],
        warnings=[e.text for e in events if isinstance(e, WarningEvent)],
    )
    return scores


def headline(events: Sequence[RunEvent], recipe: Recipe) -> list[tuple[str, float]]:
    """Return the scores before training, of each stage (best and interpolated), and final."""
    return [(name, event.mean_recall) for name, event in _chosen(events, recipe)]


def score_name(name: str) -> str:
    """Return the name of a score of ``headline`` in words."""
    if name in _SCORE_NAMES:
        return translate(_SCORE_NAMES[name])
    stage = name.removesuffix(interpolated(""))
    if stage != name:
        return _("{stage}, interpolated with its initial weights", stage=stage)
    return _("{stage}, best weights", stage=stage)


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
    chosen += [(N_("final"), event) for event in scored if event.stage == FINAL][-1:]
    return chosen


def curve(
    points: Sequence[Point],
    marks: Sequence[tuple[float, str]],
    label: str,
    dots: bool = False,
    *,
    second: Sequence[Point] = (),
    extra: Sequence[tuple[float, float, str]] = (),
    x_label: str | None = None,
) -> Markup:
    """Return an SVG of a curve.

    Args:
        points: (x, y); a ``y`` that is not a finite number is left out.
        marks: (x, text) of vertical lines, such as the starts of stages.
        label: title of the y axis, with the unit.
        dots: draw the points.
        second: another curve, drawn dashed.
        extra: (x, y, text) of points that are not on the curve.
        x_label: title of the x axis; by default the step.
    """
    points = [(x, y) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]
    if not points:
        return no_chart()
    x_label = _("step") if x_label is None else x_label
    points = points[:: max(1, len(points) // _MAX_POINTS)]
    xs, ys = zip(*points, *second, *((x, y) for x, y, _text in extra), strict=True)
    right = max(1.0, max(xs))
    x_ticks = [tick for tick in round_ticks(0.0, right, 7) if tick <= right]
    x = Axis(0.0, right, x_label, x_ticks)
    y = Axis.of(min(ys), max(ys), label)
    corner, size = (_MARGIN, 24), (_WIDTH - _MARGIN - 20, _HEIGHT - 24 - 40)
    to_pixels = linear_scale(((x.low, y.low), (x.high, y.high)), corner, size)
    shapes = axes(x, y, corner, size)
    for curve_points, dashes in ((points, ""), (second, ' stroke-dasharray="6 4"')):
        if curve_points:
            options = f' stroke-width="1.5"{dashes}'
            shapes.append(polyline(map(to_pixels, curve_points), options=options))
    for at, name in marks:
        left, _unused = to_pixels((at, y.low))
        shapes.append(
            f'<line x1="{left:.1f}" x2="{left:.1f}" y1="18" y2="{corner[1] + size[1]}" '
            'stroke="currentColor" stroke-dasharray="3 3"/>'
        )
        shapes.append(_text(left, 14, name))
    if dots:
        for point in (*points, *second):
            title = f"{x_label} {number(point[0])}: {number(point[1])}"
            shapes.append(circle(to_pixels(point), title))
    for at, value, text in extra:
        place = to_pixels((at, value))
        title = f"{text}: {number(round(value, 2))}"
        shapes.append(circle(place, title, radius=5, hollow=True))
        shapes.append(_text(place[0] - 10, place[1] + 18, text))
    return svg(_WIDTH, _HEIGHT, shapes, label)


def _text(x: float, y: float, text: str) -> str:
    """Return a text that begins at ``x``, or ends there if it would leave the chart."""
    anchor = "end" if x > 0.8 * _WIDTH else "start"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def mixtures(events: Sequence[RunEvent]) -> list[MixturesEvent]:
    """Return the interpolated weights that were scored, of each stage the last time."""
    scored = (event for event in events if isinstance(event, MixturesEvent) and event.mixtures)
    return list({event.stage: event for event in scored if _has_kept(event) is not None}.values())


def _has_kept(event: MixturesEvent) -> bool | None:
    """Return whether all scores include the kept pairs; None if only some do, in a damaged line."""
    kept = {score.kept is not None for score in event.mixtures}
    return kept.pop() if len(kept) == 1 else None


def _mixture_curve(sweep: MixturesEvent) -> Markup:
    """Return the curve of the scores of interpolated weights, above those of the initial ones."""
    first = sweep.mixtures[0]
    score = [(row.weight, _points(row.score, first.score)) for row in sweep.mixtures]
    kept = [
        (row.weight, _points(row.kept, first.kept)) for row in sweep.mixtures if _has_kept(sweep)
    ]
    marks = [(sweep.weight, _("chosen"))]
    return curve(
        score,
        marks,
        _("points of mean recall"),
        dots=True,
        second=kept,
        x_label=_("weight of the new weights"),
    )


def _points(recall: float | None, first: float | None) -> float:
    """Return the difference of two mean recalls in points."""
    assert recall is not None and first is not None
    return round(100 * (recall - first), 2)


def _retrievals(
    folder: Path, validation: EvalSet | None
) -> Iterator[tuple[str, list[tuple[str, list[tuple[bytes, str]]]]]]:
    """Yield some validation texts and their top images, before and after training."""
    if validation is None:
        return
    try:
        before, after = (_embeddings(folder / f"{name}.npz") for name in ("before", "after"))
    except DataError:
        return
    count = len(validation.texts)
    chosen = sorted({round(n * (count - 1) / max(1, _QUERIES - 1)) for n in range(_QUERIES)})
    for text in chosen:
        correct = set(validation.pairs[validation.pairs[:, 1] == text, 0].tolist())
        yield (
            validation.texts[text],
            [
                (name, list(_top_images(images, texts[text], correct, validation)))
                for name, (images, texts) in (
                    (N_("before training"), before),
                    (N_("after training"), after),
                )
            ],
        )


def _embeddings(path: Path) -> tuple[Vectors, Vectors]:
    arrays = read_npz(path, ("images", "texts"))
    return arrays["images"].astype(np.float32), arrays["texts"].astype(np.float32)


def _top_images(
    images: Vectors, text: Vectors, correct: set[int], validation: EvalSet
) -> Iterator[tuple[bytes, str]]:
    cosines = images @ text
    for image in np.argsort(-cosines, kind="stable")[:_TOP_K].tolist():
        try:
            jpeg = thumbnail(validation.image_bytes(image))
        except CNClipError:
            continue
        mark = " ✓" if image in correct else ""
        yield jpeg, f"{cosines[image]:.3f}{mark}"

"""The HTML report of a run, as one self-contained file: scores, curves, retrieved images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from cn_clip.arrays import read_npz
from cn_clip.errors import CNClipError, DataError
from cn_clip.eval.dataset import EvalSet
from cn_clip.html.charts import Point, circle, linear_scale, polyline, table
from cn_clip.html.page import data_uri, image_grid, page, thumbnail
from cn_clip.publish import atomic_file
from cn_clip.train.recipe.schema import Recipe
from cn_clip.train.run.events import FINAL, interpolated
from cn_clip.train.run.log import Event, read_log
from cn_clip.train.validation import Vectors

_QUERIES, _TOP_K = 8, 5  # queries in the report, and images of each
_MAX_POINTS = 600  # of a curve
_WIDTH, _HEIGHT, _MARGIN = 860, 220, 64

_NUMBER = (int, float)
_MAX_VALUE = 1e15
_RECALLS = ("mean_recall", *(f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)))
# Types of the fields that the report needs, by the kind of event.
_REQUIRED: dict[str, dict[str, Any]] = {
    "start": {
        "model": str,
        "parameters": int,
        "device": str,
        "processes": int,
        "pairs": int,
        "origins": list,
    },
    "stage": {"stage": str, "step": int},
    "step": dict.fromkeys(("mean_loss", "rate", "logit_scale"), (*_NUMBER, type(None))),
    "score": {"stage": str, **dict.fromkeys(_RECALLS, _NUMBER)},
    "warning": {"text": str},
    "end": {"seconds": _NUMBER},
}


def write_report(
    folder: Path, recipe: Recipe, validation: EvalSet | None
) -> list[tuple[str, float]]:
    """Write ``report.html`` into a run's folder.

    Returns:
        The scores at its top, as (name, mean recall).
    """
    events = [event for event in read_log(folder) if _is_valid(event)]
    scores = headline(events, recipe)
    steps = [event for event in events if event["kind"] == "step"]
    marks = [
        (event["total"], event["stage"])
        for event in events
        if event["kind"] == "stage" and event["step"] == 0
    ]
    scored = [e for e in events if e["kind"] == "score" and e["stage"] != FINAL]
    parts = [
        f"<h1>{escape(recipe.name)}</h1>",
        _summary(events, recipe),
        "<h2>Mean recall on the validation pairs</h2>",
        _scores(events, recipe) if scores else "<p>No validation pairs.</p>",
        curve(
            [(e["total"], 100 * e["mean_recall"]) for e in scored],
            marks,
            "mean recall, %",
            dots=True,
        ),
        *_mixtures(events),
        "<h2>Loss</h2>",
        curve([(e["total"], e["mean_loss"]) for e in steps], marks, "loss"),
        "<h2>Learning rate</h2>",
        curve([(e["total"], e["rate"]) for e in steps], marks, "learning rate"),
        "<h2>Logit scale</h2>",
        curve([(e["total"], e["logit_scale"]) for e in steps], marks, "factor on the cosine"),
        *_retrievals(folder, validation),
        "<h2>Initial weights</h2>",
        _listed(line for e in events if e["kind"] == "start" for line in e["origins"]),
        *(f'<p class="bad">{escape(e["text"])}</p>' for e in events if e["kind"] == "warning"),
        "<h2>Recipe</h2>",
        f"<pre>{escape(recipe.to_toml())}</pre>",
    ]
    with atomic_file(folder / "report.html") as path:
        path.write_text(page(f"Training: {recipe.name}", parts, "train"), encoding="utf-8")
    return scores


def _is_valid(event: Event) -> bool:
    """Return whether an event has the fields that the report needs; a line may be damaged."""
    return all(
        name in event and _fits(event[name], types)
        for name, types in (("total", int), *_REQUIRED.get(event["kind"], {}).items())
    )


def _fits(value: Any, types: Any) -> bool:
    if isinstance(value, int | float) and not abs(value) < _MAX_VALUE:  # nor NaN
        return False
    return isinstance(value, types) and not isinstance(value, bool)


def headline(events: Sequence[Event], recipe: Recipe) -> list[tuple[str, float]]:
    """Return the scores before training, of each stage (best and interpolated), and final."""
    return [(name, event["mean_recall"]) for name, event in _chosen(events, recipe)]


def _chosen(events: Sequence[Event], recipe: Recipe) -> list[tuple[str, Event]]:
    scored = [event for event in events if event["kind"] == "score"]
    chosen = [("before", event) for event in scored if event["total"] == 0]
    best = chosen[0][1] if chosen else None
    for stage in recipe.stages:
        of_stage = [e for e in scored if e["stage"] == stage.name and e["total"]]
        for event in of_stage:
            if best is None or event["mean_recall"] > best["mean_recall"]:
                best = event
        if of_stage and best is not None:
            chosen.append((stage.name, best))
        # A stage that was made longer has several; the next stage starts from the last.
        for event in [e for e in scored if e["stage"] == interpolated(stage.name)][-1:]:
            best = event
            chosen.append((event["stage"], event))
    chosen += [("final", event) for event in scored if event["stage"] == FINAL][-1:]
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
        points: (x, y); a ``y`` that is not a number is left out.
        marks: (x, text) of vertical lines, such as the starts of stages.
        label: the y axis, for screen readers.
        dots: draw the points.
        second: another curve, drawn dashed.
        x_label: the x axis.
    """
    points = [(x, y) for x, y in points if isinstance(y, int | float)]
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


def _summary(events: Sequence[Event], recipe: Recipe) -> str:
    start = next((e for e in events if e["kind"] == "start"), None)
    end = next((e for e in events if e["kind"] == "end"), None)
    sentences = []
    if start is not None:
        sentences.append(
            f"{escape(start['model'])}, {start['parameters'] / 1e6:,.1f} M parameters, "
            f"{start['pairs']:,} training pairs, on {escape(start['device'])}, "
            f"{start['processes']} process(es), {recipe.machine.precision}."
        )
    if end is not None:
        sentences.append(
            f"{end['total']:,} steps; {end['seconds'] / 60:,.1f} minutes since the last start."
        )
    return f"<p>{' '.join(sentences)}</p>"


def _scores(events: Sequence[Event], recipe: Recipe) -> str:
    chosen = _chosen(events, recipe)
    first = chosen[0][1]["mean_recall"]
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
        numbers = [event["mean_recall"], event["mean_recall"] - first, *(event[c] for c in columns)]
        shown = [f"{100 * n:.1f}" for n in numbers]
        shown[1] = "" if name == "before" else f"{100 * numbers[1]:+.1f}"
        rows.append([escape(name), *shown])
    return table(heads, rows)


def mixtures(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return the mixtures that were measured, of each stage the last time.

    Damaged events are left out.
    """
    names = ("stage", "weight", "within", "mixtures")
    whole = (each for each in events if each["kind"] == "mixtures" and _is_sweep(each))
    return list({each["stage"]: {n: each[n] for n in names} for each in whole}.values())


def _is_sweep(event: Event) -> bool:
    """Tell whether an event of mixtures has all that the page shows of them."""
    rows = event.get("mixtures")
    if not isinstance(rows, list) or not rows or not all(isinstance(each, dict) for each in rows):
        return False
    kept = type(None) if rows[0].get("kept") is None else _NUMBER
    kinds = {"weight": _NUMBER, "score": _NUMBER, "loss": _NUMBER, "kept": kept}
    return (
        isinstance(event.get("within"), bool)
        and _fits(event.get("stage"), str)
        and _fits(event.get("weight"), _NUMBER)
        and all(n in each and _fits(each[n], kind) for each in rows for n, kind in kinds.items())
    )


def _mixtures(events: Sequence[Event]) -> Iterator[str]:
    """Yield a curve and a table of the scores of the interpolated weights of each stage."""
    for sweep in mixtures(events):
        rows, weight = sweep["mixtures"], sweep["weight"]
        first = rows[0]
        has_kept = first["kept"] is not None
        yield f"<h2>Interpolated weights of stage {escape(sweep['stage'])}</h2>"
        yield (
            "<p>Mean recall of the initial and the new weights of the stage, interpolated, "
            "in points above the initial weights: on the validation pairs"
            + (" (solid), and on the kept pairs (dashed)" if has_kept else "")
            + f". Chosen weight of the new weights: {weight:g}, with the lowest validation loss "
            "of those that lose no recall there.</p>"
        )
        yield curve(
            [(e["weight"], round(100 * (e["score"] - first["score"]), 2)) for e in rows],
            [(weight, "chosen")],
            "points of mean recall",
            dots=True,
            second=[
                (e["weight"], round(100 * (e["kept"] - first["kept"]), 2)) for e in rows if has_kept
            ],
            x_label="weight",
        )
        heads = ("weight", "validation", "validation loss", *(["kept"] if has_kept else []))
        yield table(
            heads,
            (
                [
                    f"{each['weight']:g}" + (", chosen" if each["weight"] == weight else ""),
                    f"{100 * each['score']:.1f}",
                    f"{each['loss']:.3f}",
                    *([f"{100 * each['kept']:.1f}"] if has_kept else []),
                ]
                for each in rows
            ),
        )


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

"""``cn-clip eval diagnose``: where a model's recall is lost, as a page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from cn_clip.cli.loading import DEFAULT, Loading, model_paths
from cn_clip.cli.show import Flag, console, print_json, progress
from cn_clip.errors import UsageError

if TYPE_CHECKING:
    from cn_clip.eval.diagnosis.measure import Diagnosis, Difference, Length
    from cn_clip.eval.metrics.recall import Recall


def diagnose(
    *,
    data: Annotated[list[str], Parameter(negative=())],
    loading: Loading = DEFAULT,
    report: str | None = None,
    compare: str | None = None,
    threshold: float = 0.95,
    seed: int = 0,
    json: Flag = False,
) -> int:
    """Tell where a model's recall is lost, and show it on a page.

    Recall by length of the caption; hubs, which are images found for too many texts; captions of
    different images that are hardly told apart; cosines of what belongs together and what does
    not; the worst misses, with their images. With --compare, all of it for two models side by
    side, and the difference of their recalls with the 95 % interval of a paired bootstrap. The exit
    code is 1 if some of the data cannot be read.

    Parameters
    ----------
    data
        KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar; repeat it for several.
    report
        Write the page to this .html file. It holds small copies of some of the images.
    compare
        Another model, named likewise.
    threshold
        Captions are alike from this cosine on.
    seed
        Of the bootstrap, and of the texts drawn for the histogram of cosines.
    json
        Print JSON instead of tables.
    """
    from cn_clip.data.sources.open import open_mix, paths_of
    from cn_clip.eval.dataset import eval_set_of
    from cn_clip.eval.diagnosis.measure import compare as compared
    from cn_clip.eval.diagnosis.measure import diagnose
    from cn_clip.eval.diagnosis.report import write_diagnosis
    from cn_clip.eval.images import embed_eval_images
    from cn_clip.html.page import claim_page

    if report is not None and Path(report).suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--report {report}: the page is HTML; give a name that ends in .html")
    if not -1 <= threshold <= 1:
        raise UsageError(f"--threshold {threshold} is no cosine; give a number from -1 to 1")
    if report is not None:
        pairs_at = [path for each in data for path in paths_of(each)]
        models_at = model_paths(loading.model, compare)
        claim_page(report, "eval diagnose", inputs=[*pairs_at, *models_at])
    pairs = eval_set_of(open_mix(data))
    names = [loading.model] if compare is None else [loading.model, compare]
    diagnoses: list[Diagnosis] = []
    with progress() as bars:
        for name in names:
            embedder = loading.load(name)
            task = bars.add_task(f"{embedder.name}: images", total=len(pairs.images))
            images = embed_eval_images(embedder, pairs, tick=partial(bars.advance, task))
            texts = embedder.embed_texts(pairs.texts)
            total = len(images.numbers) + len(texts)
            task = bars.add_task(f"{embedder.name}: answers", total=total)
            diagnoses.append(
                diagnose(
                    embedder.name,
                    images.vectors,
                    texts,
                    pairs.texts,
                    images.pairs,
                    threshold=threshold,
                    seed=seed,
                    tick=partial(bars.advance, task),
                )
            )
    diagnoses = _named(diagnoses, names)
    differences = compared(*diagnoses, seed=seed) if compare is not None else ()
    if report is not None:
        write_diagnosis(Path(report), ", ".join(data), pairs, images, diagnoses, differences)
    if json:
        print_json(
            {
                "data": data,
                "images": len(images.numbers),
                "texts": len(diagnoses[0].texts),
                "models": [_as_json(each) for each in diagnoses],
                "differences": [_difference(each) for each in differences],
                "report": report,
                "skipped": pairs.skipped,
            }
        )
    else:
        _print(diagnoses, differences, report)
    for sentence in pairs.skipped:
        print(f"cn-clip: left out: {sentence}", file=sys.stderr)
    return 1 if pairs.skipped else 0


def _named(diagnoses: list[Diagnosis], given: list[str]) -> list[Diagnosis]:
    """Two checkpoints of one kind of model are told apart by what was asked for."""
    if len({each.model for each in diagnoses}) == len(diagnoses):
        return diagnoses
    return [
        replace(each, model=f"{each.model} ({name})")
        for each, name in zip(diagnoses, given, strict=True)
    ]


def _print(
    diagnoses: list[Diagnosis], differences: tuple[Difference, ...], report: str | None
) -> None:
    out = console()
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for each in diagnoses:
        table.add_column(each.model, justify="right")
    for name, of in _ROWS:
        table.add_row(name, *(of(each) for each in diagnoses))
    for which in range(max(len(each.lengths) for each in diagnoses)):
        length = diagnoses[0].lengths[which]
        table.add_row(
            f"R@10 of the {length.texts:,} texts of {_span(length)} characters",
            *(f"{each.lengths[which].recall.r10:.1%}" for each in diagnoses),
        )
    out.print(table)
    if differences:
        first, second = diagnoses
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column(f"{first.model} less {second.model}")
        table.add_column("points", justify="right")
        table.add_column("95 % interval", justify="right")
        for row in differences:
            lead = row.lead
            told = f"{100 * lead.low:+.1f} to {100 * lead.high:+.1f}"
            table.add_row(row.measure, f"{100 * lead.value:+.1f}", told)
        out.print(table)
    if report is not None:
        out.print(f"the page is {report}", markup=False, soft_wrap=True)


def _span(length: Length) -> str:
    return f"{length.low}" + (f" to {length.high}" if length.high > length.low else "")


def _percent(recall: Recall) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in (recall.r1, recall.r5, recall.r10))


_ROWS: tuple[tuple[str, Callable[[Diagnosis], str]], ...] = (
    ("text to image, R@1 / 5 / 10", lambda d: _percent(d.text_to_image)),
    ("image to text, R@1 / 5 / 10", lambda d: _percent(d.image_to_text)),
    ("hubs: skewness of N_10", lambda d: f"{d.hubs.skewness:.2f}"),
    ("hubs: most answers an image is among", lambda d: f"{d.hubs.counts.max():,}"),
    ("hubs: images among no answers", lambda d: f"{d.hubs.never:.1%}"),
    ("captions of different images that are alike", lambda d: f"{d.alike.texts:,}"),
    ("median cosine, belong together", lambda d: f"{d.cosines.medians[0]:.3f}"),
    ("median cosine, do not", lambda d: f"{d.cosines.medians[1]:.3f}"),
)


def _as_json(each: Diagnosis) -> dict[str, Any]:
    return {
        "model": each.model,
        "text_to_image": _recall(each.text_to_image),
        "image_to_text": _recall(each.image_to_text),
        "lengths": [
            {"low": part.low, "high": part.high, "texts": part.texts} | _recall(part.recall)
            for part in each.lengths
        ],
        "hubs": {
            "k": each.hubs.k,
            "skewness": each.hubs.skewness,
            "most": int(each.hubs.counts.max()),
            "never": each.hubs.never,
        },
        "alike": {
            "threshold": each.alike.threshold,
            "pairs": len(each.alike.pairs),
            "texts": each.alike.texts,
            "complete": each.alike.complete,
        },
        "median_cosines": dict(
            zip(
                ("matching", "others", "first_right", "first_wrong"),
                # NaN, of none, is no JSON
                (m if m == m else None for m in each.cosines.medians),
                strict=True,
            )
        ),
    }


def _difference(each: Difference) -> dict[str, Any]:
    return {
        "measure": each.measure,
        "first": each.first,
        "second": each.second,
        "lead": each.lead.value,
        "low": each.lead.low,
        "high": each.lead.high,
    }


def _recall(recall: Recall) -> dict[str, float]:
    return {"r1": recall.r1, "r5": recall.r5, "r10": recall.r10, "mean": recall.mean}

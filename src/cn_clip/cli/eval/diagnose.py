"""``cn-clip eval diagnose``: where retrieval fails, as an HTML report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from cn_clip.cli.eval.retrieval import fractions
from cn_clip.cli.loading import DEFAULT, Loading, model_paths
from cn_clip.cli.show import Amount, Flag, console, print_json, progress
from cn_clip.errors import UsageError
from cn_clip.translation import N_, _, translate

if TYPE_CHECKING:
    from cn_clip.eval.diagnosis.measure import Diagnosis, Difference, LengthBin
    from cn_clip.eval.metrics.recall import Recall


def diagnose(
    *,
    data: Annotated[list[str], Parameter(negative=())],
    loading: Loading = DEFAULT,
    report: str | None = None,
    compare: str | None = None,
    threshold: float = 0.95,
    seed: Amount = 0,
    json: Flag = False,
) -> int:
    """Show where a model's retrieval fails.

    Measures recall by caption length; hubs, which are images retrieved for too many texts; similar
    captions of different images; cosines of pairs and non-pairs; the worst misses, with their
    images. With --compare, for two models side by side, with the difference in recall and the 95 %
    interval of a paired bootstrap. The exit code is 1 if some of the data are unreadable.

    Parameters
    ----------
    data
        KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar; repeat for several.
    report
        Write an HTML report to this .html file. It contains thumbnails of some images.
    compare
        Another model, in the form of --model.
    threshold
        Cosine from which two captions count as similar.
    seed
        Seed of the bootstrap, and of the sample of texts for the histogram of cosines.
    json
        Print JSON instead of tables.
    """
    from cn_clip.data.sources.open import open_mix, paths_of
    from cn_clip.eval.dataset import eval_set_of
    from cn_clip.eval.diagnosis.measure import compare_models, diagnose
    from cn_clip.eval.diagnosis.report import write_diagnosis
    from cn_clip.eval.images import embed_eval_images
    from cn_clip.html.page import claim_page

    if report is not None and Path(report).suffix.lower() not in (".html", ".htm"):
        raise UsageError(
            _(
                "--report {report} is not an HTML file; give a name that ends in .html",
                report=report,
            )
        )
    if not -1 <= threshold <= 1:
        raise UsageError(
            _(
                "--threshold {threshold} is not a cosine; give a number from -1 to 1",
                threshold=threshold,
            )
        )
    if report is not None:
        inputs: list[str | Path] = [path for spec in data for path in paths_of(spec)]
        inputs += model_paths(loading.model, compare)
        claim_page(report, "eval diagnose", inputs=inputs)
    dataset = eval_set_of(open_mix(data))
    names = [loading.model] if compare is None else [loading.model, compare]
    diagnoses: list[Diagnosis] = []
    with progress() as bars:
        for name in names:
            embedder = loading.load(name)
            task = bars.add_task(_("{name}: images", name=name), total=len(dataset.images))
            images = embed_eval_images(embedder, dataset, tick=partial(bars.advance, task))
            texts = embedder.embed_texts(dataset.texts)
            total = len(images.indexes) + len(texts)
            task = bars.add_task(_("{name}: retrieval", name=name), total=total)
            diagnoses.append(
                diagnose(
                    name,
                    images.vectors,
                    texts,
                    dataset.texts,
                    images.pairs,
                    threshold=threshold,
                    seed=seed,
                    tick=partial(bars.advance, task),
                )
            )
    differences = compare_models(*diagnoses, seed=seed) if compare is not None else ()
    if report is not None:
        write_diagnosis(Path(report), ", ".join(data), dataset, images, diagnoses, differences)
    if json:
        print_json(
            {
                "data": data,
                "images": len(images.indexes),
                "texts": len(diagnoses[0].texts),
                "models": [_as_json(diagnosis) for diagnosis in diagnoses],
                "differences": [_difference_as_json(row) for row in differences],
                "report": report,
                "skipped": dataset.skipped,
            }
        )
    else:
        _print(diagnoses, differences, report)
    for message in dataset.skipped:
        print(_("cn-clip: skipped: {message}", message=message), file=sys.stderr)
    return 1 if dataset.skipped else 0


def _print(
    diagnoses: list[Diagnosis], differences: tuple[Difference, ...], report: str | None
) -> None:
    out = console()
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for diagnosis in diagnoses:
        table.add_column(diagnosis.model, justify="right")
    for name, value_of in _ROWS:
        table.add_row(translate(name), *(value_of(diagnosis) for diagnosis in diagnoses))
    for n, length in enumerate(diagnoses[0].lengths):
        table.add_row(
            _(
                "R@10 of {texts:,} texts of {range} characters",
                texts=length.texts,
                range=_range(length),
            ),
            *(f"{diagnosis.lengths[n].recall.r10:.1%}" for diagnosis in diagnoses),
        )
    out.print(table)
    if differences:
        first, second = diagnoses
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column(
            _("{model} minus {second_model}", model=first.model, second_model=second.model)
        )
        table.add_column(_("points"), justify="right")
        table.add_column(_("95 % interval"), justify="right")
        for row in differences:
            interval = row.interval
            limits = _(
                "{low:+.1f} to {high:+.1f}", low=100 * interval.low, high=100 * interval.high
            )
            table.add_row(translate(row.metric), f"{100 * interval.value:+.1f}", limits)
        out.print(table)
    if report is not None:
        out.print(_("report: {report}", report=report), markup=False, soft_wrap=True)


def _range(length: LengthBin) -> str:
    return f"{length.low}" + (_(" to {high}", high=length.high) if length.high > length.low else "")


def _percent(recall: Recall) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in (recall.r1, recall.r5, recall.r10))


_ROWS: tuple[tuple[str, Callable[[Diagnosis], str]], ...] = (
    (N_("text to image, R@1 / 5 / 10"), lambda d: _percent(d.text_to_image)),
    (N_("image to text, R@1 / 5 / 10"), lambda d: _percent(d.image_to_text)),
    (N_("hubs: skewness of N_10"), lambda d: f"{d.hubs.skewness:.2f}"),
    (N_("hubs: largest N_10"), lambda d: f"{d.hubs.counts.max():,}"),
    (N_("hubs: images never retrieved"), lambda d: f"{d.hubs.never_retrieved:.1%}"),
    (N_("similar captions of different images"), lambda d: f"{d.similar.texts:,}"),
    (N_("median cosine of pairs"), lambda d: f"{d.cosines.medians[0]:.3f}"),
    (N_("median cosine of non-pairs"), lambda d: f"{d.cosines.medians[1]:.3f}"),
)


def _as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    return {
        "model": diagnosis.model,
        "text_to_image": fractions(diagnosis.text_to_image),
        "image_to_text": fractions(diagnosis.image_to_text),
        "lengths": [
            {"low": part.low, "high": part.high, "texts": part.texts} | fractions(part.recall)
            for part in diagnosis.lengths
        ],
        "hubs": {
            "k": diagnosis.hubs.k,
            "skewness": diagnosis.hubs.skewness,
            "most": int(diagnosis.hubs.counts.max()),
            "never": diagnosis.hubs.never_retrieved,
        },
        "alike": {
            "threshold": diagnosis.similar.threshold,
            "pairs": len(diagnosis.similar.pairs),
            "texts": diagnosis.similar.texts,
            "complete": diagnosis.similar.complete,
        },
        "median_cosines": dict(
            zip(
                ("matching", "others", "first_right", "first_wrong"),
                # NaN, without values, is not JSON
                (m if m == m else None for m in diagnosis.cosines.medians),
                strict=True,
            )
        ),
    }


def _difference_as_json(row: Difference) -> dict[str, Any]:
    return {
        "measure": row.metric,
        "first": row.first,
        "second": row.second,
        "lead": row.interval.value,
        "low": row.interval.low,
        "high": row.interval.high,
    }

"""``cn-clip eval zeroshot``: zero-shot classification of labelled images."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from cn_clip.cli.loading import DEFAULT, Loading
from cn_clip.cli.show import Flag, console, list_failed, print_json, progress
from cn_clip.errors import UnknownNameError, UsageError
from cn_clip.translation import N_, _, translate

if TYPE_CHECKING:
    from cn_clip.eval.labelled import LabelledImages
    from cn_clip.eval.zeroshot import DatasetInfo, ZeroshotScores


def zeroshot(
    *,
    data: str,
    dataset: str | None = None,
    templates: str | None = None,
    split: Literal["test", "train"] = "test",
    truth: str | None = None,
    submission: str | None = None,
    loading: Loading = DEFAULT,
    json: Flag = False,
) -> int:
    """Measure zero-shot classification of labelled images.

    The layout is the official one: label_cn.txt with one label per line, and one folder per class,
    test/000, test/001, ... Prints the dataset's metric, top-1, top-5, mean per class and the most
    frequent confusions. Unreadable images are skipped and listed; the exit code is then 1.

    Parameters
    ----------
    data
        Folder of the dataset.
    dataset
        Name of the dataset in ELEVATER, such as cifar-10, for its metric and templates. Default:
        the folder's name, if it is one of them.
    templates
        general, satellite, texture, food, car, aircraft, digit, emotion, or a file with one
        sentence per line, {} in place of the label. Default: those of the dataset.
    split
        test or train.
    truth
        ELEVATER's test_ic.txt, with all labels of each image, for 11-point mAP.
    submission
        Write the probabilities to this .json file, in the format of ELEVATER's server.
    json
        Print JSON instead of a table.
    """
    from dataclasses import asdict

    from cn_clip.eval import zeroshot
    from cn_clip.eval.labelled import read_labelled
    from cn_clip.publish import write_text

    known = zeroshot.datasets()
    name = dataset or Path(data).resolve().name
    if dataset is not None and dataset not in known:
        raise UnknownNameError(_("dataset"), dataset, known)
    info = known.get(name, zeroshot.DatasetInfo())
    if submission is not None and name not in known:
        raise UsageError(
            _("--submission needs --dataset NAME, the name of the dataset in ELEVATER")
        )
    if submission is not None:
        inputs = [path for path in (data, truth, templates) if path is not None]
        zeroshot.claim_submission(submission, inputs=[*inputs, *loading.paths])
    sentences = zeroshot.read_templates(templates or info.templates)
    labelled = read_labelled(Path(data), split=split, truth=None if truth is None else Path(truth))
    mismatch = _count_mismatch(info, labelled, name) if split == "test" else None
    if mismatch and submission is not None:
        raise UsageError(_("{mismatch}; a submission needs the whole test set", mismatch=mismatch))
    if mismatch:
        print(
            _(
                "cn-clip: warning: {mismatch}; scores are not comparable with published ones",
                mismatch=mismatch,
            ),
            file=sys.stderr,
        )
    if info.metric == "11-point-map" and truth is None:
        print(
            _(
                "cn-clip: warning: {name} is scored by 11-point mAP, which needs all labels of an "
                "image; give ELEVATER's test_ic.txt with --truth",
                name=name,
            ),
            file=sys.stderr,
        )
    embedder = loading.load()
    with progress() as bars:
        tasks: dict[str, Any] = {}

        def tick(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total)
            bars.update(tasks[task], completed=done)

        scores = zeroshot.evaluate_zeroshot(
            embedder, labelled, sentences, metric=info.metric, tick=tick
        )
    list_failed(scores.failed)
    if submission is not None:
        count = embedder.parameter_count
        submitted = zeroshot.submission(
            scores,
            labelled,
            model=embedder.name,
            dataset=name,
            parameters=count.total,
            visual=count.image,
        )
        write_text(submission, json_format.dumps(submitted))
    if json:
        document = {
            "model": loading.model,
            "dataset": name if name in known else None,
            "templates": sentences,
            "classes": len(labelled.labels),
            "images": scores.images,
            "metric": scores.metric,
            "value": scores.value,
            "top1": scores.top1,
            "top5": scores.top5,
            "mean_per_class": scores.mean_per_class,
            "confusions": [asdict(confusion) for confusion in scores.confusions],
            "failed": scores.failed,
        }
        print_json(document)
    else:
        _print(scores, name, loading.model)
    return 1 if scores.failed else 0


def _count_mismatch(info: DatasetInfo, labelled: LabelledImages, name: str) -> str | None:
    """Return how the folder's counts differ from the dataset's test set, if they do."""
    for items, expected, count in (
        (N_("classes"), info.classes, len(labelled.labels)),
        (N_("images"), info.images, len(labelled.images)),
    ):
        if expected is not None and expected != count:
            return _(
                "{name} has {expected:,} test {items}, but the folder has {count:,}",
                name=name,
                expected=expected,
                items=translate(items),
                count=count,
            )
    return None


def _print(scores: ZeroshotScores, name: str, model: str) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(_("{name}, {images:,} images", name=name, images=scores.images), no_wrap=True)
    table.add_column(model, justify="right")
    value = _("not measured") if scores.value is None else f"{scores.value:.2%}"
    table.add_row(
        _("{metric} (metric of the dataset)", metric=translate(scores.metric)), value, style="bold"
    )
    for row, score in (
        ("top-1", scores.top1),
        ("top-5", scores.top5),
        (_("mean per class"), scores.mean_per_class),
    ):
        table.add_row(row, f"{score:.2%}")
    console().print(table)
    if scores.confusions:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in (N_("most frequent confusions"), N_("predicted"), N_("images")):
            table.add_column(translate(column), justify="right" if column == "images" else "left")
        for confusion in scores.confusions:
            table.add_row(confusion.truth, confusion.predicted, f"{confusion.count:,}")
        console().print(table)

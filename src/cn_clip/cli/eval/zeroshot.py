"""``cn-clip eval zeroshot``: labelled pictures, classified by Chinese labels."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from cn_clip.cli.loading import DEFAULT, Loading
from cn_clip.cli.show import Flag, console, print_json, progress
from cn_clip.errors import UnknownNameError, UsageError

_LISTED = 20  # pictures that failed; --json has all


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
    """Classify labelled pictures by their Chinese labels, and compare.

    The layout is the official one: label_cn.txt with a label a line, and test/000, test/001, ... a
    folder a class. Prints the metric that the dataset is scored by, top-1, top-5, the mean over
    classes, and the most frequent mistakes. Damaged pictures are left out and listed; the exit
    code is then 1.

    Parameters
    ----------
    data
        The folder.
    dataset
        The dataset's name in ELEVATER, such as cifar-10, for its metric and templates; by default
        the folder's name, if it is one of them.
    templates
        general, satellite, texture, food, car, aircraft, digit, emotion, or a file with a sentence
        a line, {} where the label goes. By default what suits the dataset.
    split
        test or train.
    truth
        ELEVATER's test_ic.txt, with all labels of each picture, for 11-point mAP.
    submission
        Write the probabilities to this .json file, as ELEVATER's server takes them.
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
        raise UnknownNameError("dataset", dataset, known)
    about = known.get(name, zeroshot.Dataset())
    if submission is not None and name not in known:
        raise UsageError("--submission needs --dataset, the name of the dataset in ELEVATER")
    if submission is not None:
        given = [each for each in (data, truth, templates) if each is not None]
        zeroshot.claim_submission(submission, inputs=[*given, *loading.paths])
    sentences = zeroshot.read_templates(templates or about.templates)
    labelled = read_labelled(Path(data), split=split, truth=None if truth is None else Path(truth))
    wrong = _unexpected(about, labelled, name) if split == "test" else None
    if wrong and submission is not None:
        raise UsageError(f"{wrong}; a submission needs the whole test set")
    if wrong:
        print(f"cn-clip: warning: {wrong}; its published figures do not compare", file=sys.stderr)
    if about.metric == "11-point-map" and truth is None:
        print(
            f"cn-clip: warning: {name} is scored by 11-point mAP, which needs all labels of a "
            "picture; give ELEVATER's test_ic.txt with --truth",
            file=sys.stderr,
        )
    embedder = loading.load()
    with progress() as bars:
        tasks: dict[str, Any] = {}

        def tick(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        scores = zeroshot.score(embedder, labelled, sentences, metric=about.metric, tick=tick)
    for sentence in scores.failed[:_LISTED]:
        print(f"cn-clip: {sentence}", file=sys.stderr)
    if len(scores.failed) > _LISTED:
        print(f"cn-clip: and {len(scores.failed) - _LISTED:,} more", file=sys.stderr)
    if submission is not None:
        count = embedder.parameter_count
        document = zeroshot.submission(
            scores,
            labelled,
            model=embedder.name,
            dataset=name,
            parameters=count.total,
            visual=count.image,
        )
        write_text(submission, json_format.dumps(document))
    if json:
        shown = {
            "model": embedder.name,
            "dataset": name if name in known else None,
            "templates": sentences,
            "classes": len(labelled.labels),
            "pictures": scores.pictures,
            "metric": scores.metric,
            "value": scores.value,
            "top1": scores.top1,
            "top5": scores.top5,
            "mean_per_class": scores.mean_per_class,
            "confusions": [asdict(each) for each in scores.confusions],
            "failed": scores.failed,
        }
        print_json(shown)
    else:
        _print(scores, name, embedder.name)
    return 1 if scores.failed else 0


def _unexpected(about: Any, labelled: Any, name: str) -> str | None:
    """Say how the folder differs from the dataset's test set, if it does."""
    for what, expected, found in (
        ("classes", about.classes, len(labelled.labels)),
        ("pictures", about.pictures, len(labelled.images)),
    ):
        if expected is not None and expected != found:
            return f"{name} has {expected:,} test {what}, but the folder has {found:,}"
    return None


def _print(scores: Any, name: str, model: str) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(f"{name}, {scores.pictures:,} pictures", no_wrap=True)
    table.add_column(model, justify="right")
    value = "not scored" if scores.value is None else f"{scores.value:.2%}"
    table.add_row(f"{scores.metric} (what it is scored by)", value, style="bold")
    for row, share in (
        ("top-1", scores.top1),
        ("top-5", scores.top5),
        ("mean per class", scores.mean_per_class),
    ):
        table.add_row(row, f"{share:.2%}")
    console().print(table)
    if scores.confusions:
        mistakes = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("most frequent mistakes", "taken for", "pictures"):
            mistakes.add_column(column, justify="right" if column == "pictures" else "left")
        for each in scores.confusions:
            mistakes.add_row(each.truth, each.predicted, f"{each.count:,}")
        console().print(mistakes)

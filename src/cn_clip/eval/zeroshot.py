"""Zero-shot classification of labelled images, as the official scripts and ELEVATER score it.

A class embedding is the normalised mean of the unit embeddings of its prompts (Radford et al.,
2021, section 3.1.4).
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.embedder import Embedder
from cn_clip.errors import DataError, UnknownNameError, UsageError
from cn_clip.eval.labelled import LabelledImages
from cn_clip.eval.metrics.classification import (
    Confusion,
    confusions,
    map_11_points,
    mean_per_class,
    ranks_of_truth,
    roc_auc,
)
from cn_clip.files import MAX_TEXT, lines_of, read_file
from cn_clip.outputs import claim, own_file, reads_as
from cn_clip.topk import checked_vectors
from cn_clip.translation import _
from cn_clip.zeroshot import label_embeddings, softmax

# The official script's logit scale, independent of the model's. The submitted probabilities, and so
# mAP and AUC on ELEVATER's server, depend on it.
LOGIT_SCALE = 100.0
# The start of what ``submission`` returns, as JSON.
_SUBMISSION = re.compile(
    rb'\{"model_name": "CN-CLIP-(?:[^"\\]|\\.)*", "dataset_name": "(?:[^"\\]|\\.)*", '
    rb'"num_trainable_params": 0, "num_params": (\d+), "num_visual_params": \d+, '
    rb'"num_backbone_params": \1, "n_shot": 0, "rnd_seeds": \[123\], "predictions": \[\[\['
)
_IMAGE_CHUNK = 256
_LABEL_CHUNK = 64

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """Metric, size of the test set and prompt templates of a dataset."""

    metric: str = "accuracy"
    classes: int | None = None
    images: int | None = None
    templates: str = "general"


@dataclass(frozen=True, slots=True)
class ZeroshotScores:
    """Scores of a model on a dataset, in [0, 1].

    Attributes:
        metric: the dataset's metric.
        value: of that metric; None if the labels for it are not given.
        top1: accuracy.
        top5: fraction of images whose true class is among the top five.
        mean_per_class: mean accuracy per class.
        confusions: the most frequent confusions.
        images: number of scored images.
        failed: a message for each unreadable image.
        probabilities: float32 (N, M), softmax of ``LOGIT_SCALE`` times the cosines, of the scored
            images.
    """

    metric: str
    value: float | None
    top1: float
    top5: float
    mean_per_class: float
    confusions: list[Confusion]
    images: int
    failed: list[str]
    probabilities: npt.NDArray[np.float32]


def datasets() -> dict[str, DatasetInfo]:
    """Return the image classification datasets of ELEVATER by name."""
    text = files("cn_clip.eval").joinpath("elevater.toml").read_text(encoding="utf-8")
    return {name: DatasetInfo(**values) for name, values in tomllib.loads(text).items()}


def template_names() -> list[str]:
    """Return the names of the shipped template sets."""
    shipped = files("cn_clip.eval").joinpath("templates").iterdir()
    return sorted(Path(each.name).stem for each in shipped if each.name.endswith(".txt"))


def read_templates(name_or_path: str) -> list[str]:
    """Read the templates of a shipped set, by name, or of a UTF-8 file, one per line.

    Raises:
        UsageError: neither exists, the file has no template, or a template has no ``{}``.
    """
    names = template_names()
    if name_or_path in names:
        raw = files("cn_clip.eval").joinpath("templates", f"{name_or_path}.txt").read_bytes()
    elif os.path.isfile(name_or_path):  # False for an invalid path
        try:
            raw = read_file(name_or_path, MAX_TEXT)
        except OSError as error:
            raise UsageError(
                _(
                    "{name_or_path} cannot be read: {reason}",
                    name_or_path=name_or_path,
                    reason=error.strerror,
                )
            ) from None
    else:
        raise UnknownNameError(_("templates"), name_or_path, [*names, _("or the path of a file")])
    try:
        lines = [(n, line.strip()) for n, line in enumerate(lines_of(raw), 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(
            _(
                "{name_or_path} is not UTF-8 (byte {position}); save it as UTF-8",
                name_or_path=name_or_path,
                position=error.start,
            )
        ) from None
    for number, line in lines:
        if "{}" not in line:
            raise UsageError(
                _(
                    "{name_or_path}, line {number}: {line!r:.60} has no {{}}; add it for the label",
                    name_or_path=name_or_path,
                    number=number,
                    line=line,
                )
            )
    if not lines:
        raise UsageError(
            _(
                "{name_or_path} has no template; write one per line, with {{}} for the label",
                name_or_path=name_or_path,
            )
        )
    return [line for _, line in lines]


def evaluate_zeroshot(
    embedder: Embedder,
    data: LabelledImages,
    templates: Sequence[str],
    *,
    metric: str = "accuracy",
    tick: Tick = lambda *_: None,
) -> ZeroshotScores:
    """Classify all images and score the result.

    Args:
        embedder: a loaded model.
        data: labelled images.
        templates: sentences with ``{}`` in place of the label.
        metric: accuracy, mean-per-class, 11-point-map or roc-auc (of the second class).
        tick: called with the name of the task, the number of items done and of all.

    Raises:
        UsageError: an embedding is not finite, or a template has no ``{}``.
        DataError: no image is readable, or a class has no image for the metric.
    """
    prototypes = checked_vectors(_prototypes(embedder, data.labels, templates, tick), "labels")
    rows: list[npt.NDArray[np.float32]] = []
    readable: list[int] = []
    failed: list[str] = []
    for start in range(0, len(data.images), _IMAGE_CHUNK):
        chunk = data.images[start : start + _IMAGE_CHUNK]
        images, errors = embedder.embed_readable(chunk)
        cosines = (
            checked_vectors(images, _("images from {first} on", first=chunk[0])) @ prototypes.T
        )  # (B, M)
        rows.append(softmax(LOGIT_SCALE * cosines))
        readable += [start + n for n in range(len(chunk)) if n not in errors]
        failed += [str(error) for error in errors.values()]
        tick(_("classifying images"), start + len(chunk), len(data.images))
    if not readable:
        raise DataError(
            _(
                "none of the {image_count:,} images is readable; {failed}",
                image_count=len(data.images),
                failed=failed[0],
            )
        )
    probabilities, truth = np.concatenate(rows), data.truth[readable]
    ranks = ranks_of_truth(probabilities, truth)
    per_class = mean_per_class(probabilities, truth)
    value: float | None
    if metric == "11-point-map":
        value = (
            None if data.relevant is None else map_11_points(probabilities, data.relevant[readable])
        )
    elif metric == "roc-auc":
        value = roc_auc(probabilities[:, 1], truth == 1)
    else:
        value = per_class if metric == "mean-per-class" else float(np.mean(ranks == 0))
    return ZeroshotScores(
        metric=metric,
        value=value,
        top1=float(np.mean(ranks == 0)),
        top5=float(np.mean(ranks < 5)),
        mean_per_class=per_class,
        confusions=confusions(probabilities, truth, data.labels),
        images=len(readable),
        failed=failed,
        probabilities=probabilities,
    )


def claim_submission(out: str | Path, *, inputs: Iterable[str | Path] = ()) -> Path:
    """Return ``out`` as a path if a submission may be written there; nothing is written yet.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    own = own_file("eval zeroshot", reads_as(_SUBMISSION, b"]]]}"))
    return claim(out, own, option="--submission", inputs=inputs)


def submission(
    scores: ZeroshotScores,
    data: LabelledImages,
    *,
    model: str,
    dataset: str,
    parameters: int,
    visual: int,
) -> dict[str, Any]:
    """Return the JSON document of a submission to ELEVATER's server, as the official script writes
    it: probabilities rounded to six decimals, in the order of ``index.json`` if there is one.

    Args:
        scores: of this data.
        data: the scored images.
        model: name of the model.
        dataset: ELEVATER's name of the dataset.
        parameters: number of parameters of the model.
        visual: number of parameters of the image tower.

    Raises:
        DataError: an image is unreadable.
    """
    if scores.failed:
        raise DataError(
            _(
                "a submission needs all images, but {failed_count:,} are unreadable; the first: "
                "{failed}",
                failed_count=len(scores.failed),
                failed=scores.failed[0],
            )
        )
    rows = scores.probabilities if data.order is None else scores.probabilities[data.order]
    return {
        "model_name": f"CN-CLIP-{model}",
        "dataset_name": dataset,
        "num_trainable_params": 0,
        "num_params": parameters,
        "num_visual_params": visual,
        "num_backbone_params": parameters,
        "n_shot": 0,
        "rnd_seeds": [123],
        "predictions": [[[round(value, 6) for value in row] for row in rows.tolist()]],
    }


def _prototypes(
    embedder: Embedder, labels: Sequence[str], templates: Sequence[str], tick: Tick
) -> npt.NDArray[np.float32]:
    rows = []
    for start in range(0, len(labels), _LABEL_CHUNK):
        chunk = labels[start : start + _LABEL_CHUNK]
        rows.append(label_embeddings(embedder, chunk, templates))
        tick(_("embedding labels"), start + len(chunk), len(labels))
    return np.concatenate(rows)

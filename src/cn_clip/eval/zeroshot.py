"""Zero-shot classification of labelled pictures, as the official scripts and ELEVATER have it.

Class folders in ``test/``, a Chinese label a line in ``label_cn.txt``; a class is the mean of its
prompts' unit embeddings, made one of unit length again (Radford et al., 2021, section 3.1.4).
"""

from __future__ import annotations

import os
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
from cn_clip.eval.labelled import Labelled
from cn_clip.eval.metrics.classification import (
    Confusion,
    confusions,
    map_11_points,
    mean_per_class,
    ranks_of_truth,
    roc_auc,
)
from cn_clip.files import MAX_TEXT, lines_of, read_file
from cn_clip.outputs import claim, own_file, starts_with
from cn_clip.topk import checked
from cn_clip.zeroshot import label_embeddings

# The official script's factor before the softmax, whatever the model learned; what is submitted to
# ELEVATER's server, and so mAP and AUC there, depend on it.
SCALE = 100.0
_IMAGES_AT_ONCE = 256
_LABELS_AT_ONCE = 64

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a known dataset is scored by, how large its test set is, and the templates for it."""

    metric: str = "accuracy"
    classes: int | None = None
    pictures: int | None = None
    templates: str = "general"


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model scores on a dataset, shares in [0, 1].

    Attributes:
        metric: the one that the dataset is scored by.
        value: of that metric; None where the truth for it was not given.
        top1: share of pictures whose best class is right.
        top5: share of pictures whose right class is among the best five.
        mean_per_class: the mean over classes of ``top1``.
        confusions: the most frequent mistakes.
        pictures: how many were scored.
        failed: why each of the others was not.
        probabilities: float32 (N, M), softmax of ``SCALE`` times the cosines, of those scored.
    """

    metric: str
    value: float | None
    top1: float
    top5: float
    mean_per_class: float
    confusions: list[Confusion]
    pictures: int
    failed: list[str]
    probabilities: npt.NDArray[np.float32]


def datasets() -> dict[str, Dataset]:
    """Return the datasets of ELEVATER's image classification by name."""
    text = files("cn_clip.eval").joinpath("elevater.toml").read_text(encoding="utf-8")
    return {name: Dataset(**values) for name, values in tomllib.loads(text).items()}


def template_names() -> list[str]:
    """Return the names of the shipped template sets."""
    shipped = files("cn_clip.eval").joinpath("templates").iterdir()
    return sorted(Path(each.name).stem for each in shipped if each.name.endswith(".txt"))


def read_templates(given: str) -> list[str]:
    """Read the templates of a shipped set, by name, or of a UTF-8 file, one a line.

    Raises:
        UsageError: there is neither, the file holds none, or one has no ``{}`` for the label.
    """
    names = template_names()
    if given in names:
        raw = files("cn_clip.eval").joinpath("templates", f"{given}.txt").read_bytes()
    elif os.path.isfile(given):  # False for what is no path at all
        try:
            raw = read_file(given, MAX_TEXT)
        except OSError as error:
            raise UsageError(f"{given} cannot be read: {error.strerror}") from None
    else:
        raise UnknownNameError("templates", given, [*names, "or the path of a file"])
    try:
        lines = [(at, each.strip()) for at, each in enumerate(lines_of(raw), 1) if each.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{given} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    for at, line in lines:
        if "{}" not in line:
            raise UsageError(
                f"{given}, line {at}: {line!r:.60} has no {{}}; say where the label goes"
            )
    if not lines:
        raise UsageError(f"{given} holds no template; write one a line, with {{}} for the label")
    return [line for _, line in lines]


def score(
    embedder: Embedder,
    data: Labelled,
    templates: Sequence[str],
    *,
    metric: str = "accuracy",
    tick: Tick = lambda *_: None,
) -> Scores:
    """Classify every picture and compare with the truth.

    Args:
        embedder: a loaded model.
        data: labelled pictures.
        templates: sentences with ``{}`` where the label goes.
        metric: accuracy, mean-per-class, 11-point-map or roc-auc (of the second class).
        tick: called with what is done, how much of it, and how much there is.

    Raises:
        UsageError: an embedding is not finite, or a template has no slot.
        DataError: no picture can be read, or a class has none for the metric.
    """
    prototypes = checked(_prototypes(embedder, data.labels, templates, tick), "labels")
    rows: list[npt.NDArray[np.float32]] = []
    read: list[int] = []
    failed: list[str] = []
    for at in range(0, len(data.images), _IMAGES_AT_ONCE):
        some = data.images[at : at + _IMAGES_AT_ONCE]
        images, errors = embedder.embed_readable(some)
        cosines = checked(images, f"pictures from {some[0]} on") @ prototypes.T  # (B, M)
        rows.append(_softmax(SCALE * cosines))
        read += [at + n for n in range(len(some)) if n not in errors]
        failed += [str(error) for error in errors.values()]
        tick("classifying pictures", at + len(some), len(data.images))
    if not read:
        raise DataError(f"none of the {len(data.images):,} pictures can be read; {failed[0]}")
    found, truth = np.concatenate(rows), data.truth[read]
    ranks = ranks_of_truth(found, truth)
    per_class = mean_per_class(found, truth)
    value: float | None
    if metric == "11-point-map":
        value = None if data.relevant is None else map_11_points(found, data.relevant[read])
    elif metric == "roc-auc":
        value = roc_auc(found[:, 1], truth == 1)
    else:
        value = per_class if metric == "mean-per-class" else float(np.mean(ranks == 0))
    return Scores(
        metric=metric,
        value=value,
        top1=float(np.mean(ranks == 0)),
        top5=float(np.mean(ranks < 5)),
        mean_per_class=per_class,
        confusions=confusions(found, truth, data.labels),
        pictures=len(read),
        failed=failed,
        probabilities=found,
    )


def claim_submission(out: str | Path, *, inputs: Iterable[str | Path] = ()) -> Path:
    """Check that a submission may be written to ``out``; nothing is touched. Return it as a path.

    Raises:
        UsageError: see ``outputs.claim``.
    """
    own = own_file("eval zeroshot", starts_with(b'{"model_name": "CN-CLIP-'))
    return claim(out, own, option="--submission", inputs=inputs)


def submission(
    scores: Scores, data: Labelled, *, model: str, dataset: str, parameters: int, visual: int
) -> dict[str, Any]:
    """Return the document that ELEVATER's server takes for a dataset, as the official script writes
    it: probabilities rounded to six places, in the order of ``index.json`` if there is one.

    Args:
        scores: of this data.
        data: what was scored.
        model: its name.
        dataset: ELEVATER's name of it.
        parameters: how many the model has.
        visual: how many its image tower has.

    Raises:
        DataError: a picture was not scored.
    """
    if scores.failed:
        raise DataError(
            f"a submission needs every picture, and {len(scores.failed):,} cannot be read; the "
            f"first: {scores.failed[0]}"
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
        "predictions": [[[round(share, 6) for share in row] for row in rows.tolist()]],
    }


def _prototypes(
    embedder: Embedder, labels: Sequence[str], templates: Sequence[str], tick: Tick
) -> npt.NDArray[np.float32]:
    rows = []
    for at in range(0, len(labels), _LABELS_AT_ONCE):
        some = labels[at : at + _LABELS_AT_ONCE]
        rows.append(label_embeddings(embedder, some, templates))
        tick("embedding labels", at + len(some), len(labels))
    return np.concatenate(rows)


def _softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    shares: npt.NDArray[np.float32] = weights / weights.sum(axis=1, keepdims=True)
    return shares

"""Zero-shot classification of images by Chinese labels."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cn_clip.calibration import Calibration, check_model, probability, read_calibration
from cn_clip.embedder import Embedder
from cn_clip.errors import UsageError
from cn_clip.image.decode import ImageInput
from cn_clip.progress import ProgressOption
from cn_clip.text import valid_text
from cn_clip.translation import _


class Prediction(NamedTuple):
    """The scores of one image for one label; ``match`` is None without a calibration."""

    label: str
    probability: float
    cosine: float
    match: float | None = None


@dataclass(frozen=True, slots=True)
class Classification:
    """Scores of N images against M labels.

    ``result[i]`` has the predictions of image i, best first: ``result[0][0].label``.

    Attributes:
        labels: the M distinct labels.
        probabilities: float32 (N, M), softmax over the labels: each row sums to 1 even if no label
            fits.
        cosines: float32 (N, M), between -1 and 1, independent of the other labels.
        match_probabilities: float64 (N, M), calibrated probability that image and label match;
            None without a calibration.
        none_of_these: bool (N,), True where the highest cosine is below the calibration's
            threshold for labels; None without a calibration or a threshold.
    """

    labels: tuple[str, ...]
    probabilities: npt.NDArray[np.float32]
    cosines: npt.NDArray[np.float32]
    match_probabilities: npt.NDArray[np.float64] | None = None
    none_of_these: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.probabilities)

    def __getitem__(self, index: int) -> list[Prediction]:
        row = range(len(self))[index]  # a negative index counts from the end
        best_first = np.argsort(-self.probabilities[row], kind="stable")
        return [self._prediction(row, column) for column in best_first]

    def __iter__(self) -> Iterator[list[Prediction]]:
        return (self[row] for row in range(len(self)))

    def to_dicts(self, top: int | None = None) -> list[dict[str, Any]]:
        """Return JSON values for each image: ``{"predictions": [{"label": ..., ...}, ...]}``.

        Args:
            top: number of predictions of an image; the default is all.

        With a calibration, a prediction has ``match``, and an image ``none_of_these``, None without
        a threshold.
        """
        calibrated, none = self.match_probabilities is not None, self.none_of_these
        rows = []
        for number, predictions in enumerate(self):
            values = [prediction._asdict() for prediction in predictions[:top]]
            row: dict[str, Any] = {"predictions": values}
            if calibrated:
                row["none_of_these"] = None if none is None else bool(none[number])
            else:
                for value in values:
                    del value["match"]
            rows.append(row)
        return rows

    def _prediction(self, row: int, column: int) -> Prediction:
        match = self.match_probabilities
        return Prediction(
            self.labels[column],
            float(self.probabilities[row, column]),
            float(self.cosines[row, column]),
            None if match is None else float(match[row, column]),
        )

    def ranking(self, count: int) -> npt.NDArray[np.int64]:
        """Return the label indexes (N, min(count, M)) of each image, best first."""
        return np.argsort(-self.probabilities, axis=1, kind="stable")[:, :count]

    def top(self, count: int) -> list[list[tuple[str, float, float]]]:
        """Return the best ``(label, probability, cosine)`` of each image, best first."""
        return [
            [
                (self.labels[j], float(self.probabilities[i, j]), float(self.cosines[i, j]))
                for j in row
            ]
            for i, row in enumerate(self.ranking(count))
        ]


def classify(
    embedder: Embedder,
    images: ImageInput | Iterable[ImageInput],
    labels: Sequence[str],
    *,
    templates: Sequence[str] = ("{}",),
    calibration: Calibration | str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    progress: ProgressOption = False,
) -> Classification:
    """Score images against labels (Radford et al., arXiv:2103.00020, section 3.1).

    Args:
        embedder: a loaded model.
        images: as for ``Embedder.embed_images``.
        labels: at least two; duplicates are removed with a warning.
        templates: sentences with ``{}`` in place of the label, such as ``"一张{}的照片"``; a
            label's embedding is the mean over the templates.
        calibration: of this model, or its file: adds match probabilities and ``none_of_these``.
        batch_size, progress: as for ``Embedder.embed_images``.

    Raises:
        UsageError: fewer than two distinct labels, an empty label, a template without ``{}``, or a
            calibration of another model.
        ImageError: an image is unreadable.
    """
    names = distinct(labels)
    if isinstance(calibration, str | os.PathLike):
        calibration = read_calibration(Path(calibration))
    if calibration is not None:
        check_model(calibration, embedder)
    prototypes = label_embeddings(embedder, names, templates)
    embeddings = embedder.embed_images(images, batch_size=batch_size, progress=progress)
    return classify_embeddings(embedder, embeddings, names, prototypes, calibration=calibration)


def classify_embeddings(
    embedder: Embedder,
    image_embeddings: npt.NDArray[np.float32],
    labels: Sequence[str],
    prototypes: npt.NDArray[np.float32],
    *,
    calibration: Calibration | None = None,
) -> Classification:
    """Score image embeddings (N, D) against label embeddings (M, D)."""
    cosines = image_embeddings @ prototypes.T
    probabilities = softmax(embedder.logit_scale * cosines)
    if calibration is None:
        return Classification(tuple(labels), probabilities, cosines)
    threshold = calibration.thresholds["labels"]
    # float64, the type of the threshold: rounded to float32 it could equal the cosine
    best = cosines.max(axis=1).astype(np.float64)
    return Classification(
        tuple(labels),
        probabilities,
        cosines,
        match_probabilities=probability(calibration.curve, cosines),
        none_of_these=None if threshold is None else best < threshold,
    )


def softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the softmax of each row, (N, M)."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    result: npt.NDArray[np.float32] = weights / weights.sum(axis=1, keepdims=True)
    return result


def label_embeddings(
    embedder: Embedder, labels: Sequence[str], templates: Sequence[str] = ("{}",)
) -> npt.NDArray[np.float32]:
    """Return a unit vector for each label, float32 (M, D): the mean over the templates."""
    if isinstance(templates, str):
        raise UsageError(
            _(
                "templates is one string, {templates!r:.60}; give a list of templates",
                templates=templates,
            )
        )
    for template in templates:
        if "{}" not in template:
            raise UsageError(
                _(
                    "the template {template!r} has no {{}}; add it where the label goes",
                    template=template,
                )
            )
    if not templates:
        raise UsageError(_("no templates given; use ['{}'] for the labels alone"))
    sentences = [valid_text(template) for template in templates]
    texts = [sentence.replace("{}", label) for label in labels for sentence in sentences]
    embeddings = embedder.embed_texts(texts).reshape(len(labels), len(templates), -1)
    mean = embeddings.mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)  # type: ignore[no-any-return]


def distinct(labels: Iterable[str]) -> list[str]:
    """Return the stripped labels without duplicates, in order; warn about duplicates.

    Raises:
        UsageError: a label is empty, or fewer than two are left.
    """
    if isinstance(labels, str):
        raise UsageError(
            _("labels is one string, {labels!r:.60}; give a list of labels", labels=labels)
        )
    labels = list(labels)
    invalid = next((label for label in labels if not isinstance(label, str)), None)
    if invalid is not None:
        raise UsageError(_("label {invalid!r:.60} is not a string", invalid=invalid))
    stripped = [valid_text(label).strip() for label in labels]
    if "" in stripped:
        raise UsageError(
            _(
                "label {number} of {label_count} is empty; remove it",
                number=stripped.index("") + 1,
                label_count=len(stripped),
            )
        )
    unique = list(dict.fromkeys(stripped))
    if len(unique) < 2:
        given = _("only the label {label!r}", label=unique[0]) if unique else _("no labels")
        raise UsageError(_("{given} given; give at least two different labels", given=given))
    if len(unique) < len(stripped):
        repeated = Counter(stripped).most_common(1)[0][0]
        warnings.warn(
            _("label {repeated!r} is given more than once; counted once", repeated=repeated),
            stacklevel=3,
        )
    return unique

"""Zero-shot classification: which of some Chinese labels fits a picture best."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cn_clip.embedder import Embedder
from cn_clip.errors import UsageError
from cn_clip.image.decode import ImageInput
from cn_clip.text import valid_text


@dataclass(frozen=True, slots=True)
class Classification:
    """Scores of N pictures against M labels.

    Attributes:
        labels: the M labels, without repeats.
        probabilities: float32 (N, M), a softmax over the labels given: each row sums to 1 even
            when no label fits, so read it beside ``cosines``.
        cosines: float32 (N, M), between -1 and 1, independent of which other labels are given.
    """

    labels: tuple[str, ...]
    probabilities: npt.NDArray[np.float32]
    cosines: npt.NDArray[np.float32]

    def top(self, count: int) -> list[list[tuple[str, float, float]]]:
        """Return, for each picture, the best ``(label, probability, cosine)``, best first."""
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :count]
        return [
            [
                (self.labels[j], float(self.probabilities[i, j]), float(self.cosines[i, j]))
                for j in row
            ]
            for i, row in enumerate(order)
        ]


def classify(
    embedder: Embedder,
    images: ImageInput | Iterable[ImageInput],
    labels: Sequence[str],
    *,
    templates: Sequence[str] = ("{}",),
) -> Classification:
    """Score pictures against labels (Radford et al., arXiv:2103.00020, section 3.1).

    Args:
        embedder: a loaded model.
        images: as for ``Embedder.embed_images``.
        labels: at least two. Repeated ones are counted once, with a warning.
        templates: sentences with ``{}`` where the label goes, such as ``"一张{}的照片"``; a
            label's embedding is the mean over all of them.

    Raises:
        UsageError: fewer than two different labels, an empty one, or a template without ``{}``.
        ImageError: a picture cannot be used.
    """
    names = distinct(labels)
    prototypes = label_embeddings(embedder, names, templates)
    return score(embedder, embedder.embed_images(images), names, prototypes)


def score(
    embedder: Embedder,
    image_embeddings: npt.NDArray[np.float32],
    labels: Sequence[str],
    prototypes: npt.NDArray[np.float32],
) -> Classification:
    """Score image embeddings (N, D) against label embeddings (M, D)."""
    cosines = image_embeddings @ prototypes.T
    logits = embedder.logit_scale * cosines
    weights = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return Classification(tuple(labels), weights / weights.sum(axis=1, keepdims=True), cosines)


def label_embeddings(
    embedder: Embedder, labels: Sequence[str], templates: Sequence[str] = ("{}",)
) -> npt.NDArray[np.float32]:
    """Return one unit vector per label, float32 (M, D): the mean over the templates."""
    if isinstance(templates, str):
        raise UsageError(f"templates is one string, {templates!r:.60}; give a list of templates")
    for template in templates:
        if "{}" not in template:
            raise UsageError(f"the template {template!r} has no {{}}; say where the label goes")
    if not templates:
        raise UsageError("no templates given; use ['{}'] for the labels as they are")
    sentences = [valid_text(template) for template in templates]
    texts = [sentence.replace("{}", label) for label in labels for sentence in sentences]
    each = embedder.embed_texts(texts).reshape(len(labels), len(templates), -1)
    mean = each.mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)  # type: ignore[no-any-return]


def distinct(labels: Iterable[str]) -> list[str]:
    """Return the labels stripped and without repeats, in order; warn if there were repeats.

    Raises:
        UsageError: one is empty, or fewer than two are left.
    """
    if isinstance(labels, str):
        raise UsageError(f"labels is one string, {labels!r:.60}; give a list of labels")
    labels = list(labels)
    strange = next((label for label in labels if not isinstance(label, str)), None)
    if strange is not None:
        raise UsageError(f"label {strange!r:.60} is not a string")
    stripped = [valid_text(label).strip() for label in labels]
    if "" in stripped:
        raise UsageError(f"label {stripped.index('') + 1} of {len(stripped)} is empty; remove it")
    unique = list(dict.fromkeys(stripped))
    if len(unique) < 2:
        given = f"the one label {unique[0]!r}" if unique else "no label"
        raise UsageError(
            f"{given} cannot be compared with anything, its probability would always be 1; "
            "give at least two different labels"
        )
    if len(unique) < len(stripped):
        repeated = Counter(stripped).most_common(1)[0][0]
        warnings.warn(f"label {repeated!r} is given more than once; counted once", stacklevel=3)
    return unique

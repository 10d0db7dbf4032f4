"""Published scores and the conditions they were measured under, from ``protocols.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from cn_clip.data.sources.open import open_mix
from cn_clip.embedder import Embedder
from cn_clip.errors import DataError, UnknownNameError
from cn_clip.eval.dataset import EvalSet, eval_set_of
from cn_clip.eval.metrics.recall import Recall
from cn_clip.eval.official_files import Direction
from cn_clip.eval.retrieval import RetrievalResult, Tick, measure
from cn_clip.translation import _, translate

Setup = Literal["zero-shot", "fine-tuned"]
MEASURES = ("R@1", "R@5", "R@10")


@dataclass(frozen=True, slots=True)
class Protocol:
    """One column of the published tables.

    Attributes:
        images: images in the split; None if no source states it.
        texts: texts in the split, likewise.
        published: setup, direction, model -> R@1, R@5, R@10 in percent.
        best_of_five: of a classification set, the score of the best of the five models.
        rerun: model -> percent that a user measured with the official scripts.
        source: of the scores and counts.
    """

    name: str
    title: str
    task: Literal["retrieval", "classification"]
    split: str
    context_length: int
    source: str
    metric: str = "recall"
    directions: tuple[Direction, ...] = ()
    images: int | None = None
    texts: int | None = None
    published: dict[Setup, dict[Direction, dict[str, list[float]]]] = field(default_factory=dict)
    best_of_five: float | None = None
    rerun: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScoreComparison:
    """A measured and the published score in percent; None if none was published."""

    direction: Direction
    measure: str
    ours: float
    published: float | None

    @property
    def difference(self) -> float | None:
        return None if self.published is None else self.ours - self.published


@cache
def protocols() -> dict[str, Protocol]:
    """Return all protocols by name."""
    text = files("cn_clip.eval").joinpath("protocols.toml").read_text("utf-8")
    return {name: Protocol(name, **values) for name, values in tomllib.loads(text).items()}


def protocol(name: str) -> Protocol:
    """Return a protocol.

    Raises:
        UnknownNameError: the name is unknown.
    """
    if name not in protocols():
        raise UnknownNameError(_("protocol"), name, protocols())
    return protocols()[name]


def open_split(spec: Protocol, data: str) -> EvalSet:
    """Open a retrieval protocol's data: a source of pairs, or a folder with ``SPLIT_imgs.tsv``.

    Texts are counted by id, and images without a text are in the gallery, as in the official
    evaluation.

    Raises:
        DataError: the counts are not the protocol's, or a row is unreadable.
    """
    official = Path(data) / f"{spec.split}_imgs.tsv"
    mix = open_mix([f"tsv:{official}?unpaired=yes" if official.is_file() else data])
    dataset = eval_set_of(mix, merge=False)
    if dataset.skipped:
        rows = sum(len(part.source) for part in mix)
        raise DataError(
            _(
                "{skipped_count:,} of {rows:,} rows of {data} are unreadable, so scores cannot be "
                "compared; the first: {skipped}",
                skipped_count=len(dataset.skipped),
                rows=rows,
                data=data,
                skipped=dataset.skipped[0],
            )
        )
    counts = len(dataset.images), len(dataset.texts)
    for expected, count in zip((spec.images, spec.texts), counts, strict=True):
        if expected is not None and expected != count:
            raise DataError(
                _(
                    "{title}, has {expected}, but {data} has {images:,} images and {texts:,} "
                    "texts; give the whole {split} split",
                    title=translate(spec.title),
                    expected=_counts(spec),
                    data=data,
                    images=counts[0],
                    texts=counts[1],
                    split=spec.split,
                )
            )
    return dataset


def run_protocol(
    embedder: Embedder, dataset: EvalSet, *, tick: Tick = lambda done, total: None
) -> RetrievalResult:
    """Measure recall on a protocol's data.

    Raises:
        DataError: an image is unreadable, so scores cannot be compared.
    """
    result = measure(embedder, dataset, tick=tick)
    if result.failed:
        raise DataError(
            _(
                "{failed_count:,} of {image_count:,} images are unreadable, so scores cannot be "
                "compared; the first: {failed}",
                failed_count=len(result.failed),
                image_count=len(dataset.images),
                failed=result.failed[0],
            )
        )
    return result


def compare_with_published(
    spec: Protocol, result: RetrievalResult, *, setup: Setup = "zero-shot"
) -> list[ScoreComparison]:
    """Return each score of the protocol with the published one of this model."""
    recalls: dict[Direction, Recall] = {
        "text_to_image": result.recall.text_to_image,
        "image_to_text": result.recall.image_to_text,
    }
    rows = []
    for direction in spec.directions:
        recall = recalls[direction]
        ours = [100 * value for value in (recall.r1, recall.r5, recall.r10)]
        table = spec.published.get(setup, {}).get(direction, {})
        theirs: Sequence[float | None] = table.get(result.model, [None] * len(ours))
        rows += [
            ScoreComparison(direction, name, our_score, published)
            for name, our_score, published in zip(MEASURES, ours, theirs, strict=True)
        ]
    return rows


def _counts(spec: Protocol) -> str:
    parts = [
        f"{count:,} {what}"
        for count, what in ((spec.images, "images"), (spec.texts, "texts"))
        if count is not None
    ]
    return _(" and ").join(parts)

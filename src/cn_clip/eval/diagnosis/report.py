"""HTML report of a diagnosis, or of two side by side; images are embedded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cn_clip.errors import CNClipError
from cn_clip.eval.dataset import EvalSet
from cn_clip.eval.diagnosis.measure import BINS, Diagnosis, Difference
from cn_clip.eval.images import EmbeddedImages
from cn_clip.eval.metrics.recall import Ranks
from cn_clip.html.page import data_uri, thumbnail, write_page
from cn_clip.translation import _

_MAX_IMAGES = 12  # in a grid
_MAX_MISSES = 20
_MAX_CAPTIONS = 30  # pairs of similar captions
_MAX_SKIPPED = 50
_TOP = 3  # results shown of a missed query


@dataclass(frozen=True, slots=True)
class _Miss:
    """A text whose rank, from 1, is not 1, and its top images with their cosines."""

    text: int
    rank: int
    results: Sequence[tuple[int, float]]


def write_diagnosis(
    path: Path,
    name: str,
    dataset: EvalSet,
    images: EmbeddedImages,
    diagnoses: Sequence[Diagnosis],
    differences: Sequence[Difference] = (),
) -> None:
    """Write the report atomically.

    Args:
        path: of the report.
        name: of the data, for display.
        dataset: source of the images and captions.
        images: the embedded images.
        diagnoses: of one or two models.
        differences: of the two, from ``compare_models``.
    """
    by_image = images.pairs[np.argsort(images.pairs[:, 0], kind="stable")]
    by_text = images.pairs[np.argsort(images.pairs[:, 1], kind="stable")]

    @cache  # hubs are on the page many times
    def thumbnail_uri(image: int) -> str:
        try:
            return data_uri(thumbnail(dataset.image_bytes(int(images.indexes[image]))))
        except CNClipError:  # deleted since it was embedded
            return ""

    def captions_of(image: int) -> str:
        start, end = np.searchsorted(by_image[:, 0], [image, image + 1])
        captions = (dataset.texts[text] for text in by_image[start:end, 1][:2].tolist())
        return " / ".join(captions) or _("(without a caption)")

    def image_of(text: int) -> int:
        return int(by_text[np.searchsorted(by_text[:, 1], text), 0])

    models = [diagnosis.model for diagnosis in diagnoses]
    write_page(
        path,
        "eval/diagnosis/report.html",
        _("{models} on {name}", models=_(" and ").join(models), name=name),
        _("eval diagnose"),
        images=images,
        diagnoses=diagnoses,
        differences=differences,
        captions=dataset.texts,
        skipped=dataset.skipped,
        bins=BINS,
        max_images=_MAX_IMAGES,
        max_captions=_MAX_CAPTIONS,
        thumbnail=thumbnail_uri,
        captions_of=captions_of,
        image_of=image_of,
        worst_misses=lambda diagnosis: _misses(diagnosis, diagnosis.image_ranks),
        only_found_by=_only_found_by,
        missed_images=_missed_images,
    )


def _only_found_by(finder: Diagnosis, other: Diagnosis) -> Iterator[_Miss]:
    """Yield the queries that ``finder`` ranks first and ``other`` ranks lowest."""
    return _misses(other, np.where(finder.image_ranks == 0, other.image_ranks, 0))


def _misses(diagnosis: Diagnosis, ranks: Ranks) -> Iterator[_Miss]:
    """Yield the queries with the highest ranks (Q,)."""
    top = diagnosis.top_images
    for query in _highest(ranks, _MAX_MISSES):
        results = zip(top.indexes[query].tolist(), top.scores[query].tolist(), strict=True)
        text, rank = int(diagnosis.texts[query]), int(diagnosis.image_ranks[query]) + 1
        yield _Miss(text, rank, tuple(results)[:_TOP])


def _missed_images(diagnosis: Diagnosis) -> Iterator[tuple[int, int, int]]:
    """Yield (image, its top text, rank of its best caption from 1) of the worst images."""
    for query in _highest(diagnosis.text_ranks, _MAX_IMAGES):
        yield (
            int(diagnosis.images[query]),
            int(diagnosis.top_texts.indexes[query, 0]),
            int(diagnosis.text_ranks[query]) + 1,
        )


def _highest(ranks: Ranks, count: int) -> list[int]:
    """Return the queries with the highest ranks, without those of rank 0."""
    order = np.argsort(-ranks, kind="stable")[:count]
    queries: list[int] = order[ranks[order] > 0].tolist()
    return queries

"""Where retrieval fails: caption lengths, hubs, similar captions, cosines, worst misses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.eval.metrics.bootstrap import Interval, Values, paired_interval
from cn_clip.eval.metrics.recall import (
    Pairs,
    Ranks,
    Recall,
    mean_recall_by_query,
    ranks_of_best,
    recall_of,
)
from cn_clip.topk import TopK, Vectors, top_k
from cn_clip.translation import N_

K = 10  # results per query in which hubs are counted
_LENGTH_EDGES = (1, 3, 5, 7, 9, 12, 16, 24, 32, 48)  # lower edges of the length bins, in characters
_SAMPLE = 2_000  # texts whose cosines to all images are counted
_BLOCK = 1 << 22  # cosines in memory at a time, 16 MiB
_TEXT_TO_IMAGE = (
    N_("text to image, R@1"),
    N_("text to image, R@5"),
    N_("text to image, R@10"),
    N_("text to image, mean recall"),
)
_IMAGE_TO_TEXT = (
    N_("image to text, R@1"),
    N_("image to text, R@5"),
    N_("image to text, R@10"),
    N_("image to text, mean recall"),
)
_MAX_SIMILAR = 1_000_000  # pairs of similar captions in memory, 16 MB
BINS = np.linspace(-1, 1, 201)  # edges of the cosine histograms

Indexes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LengthBin:
    """Recall of the ``texts`` with ``low`` to ``high`` characters."""

    low: int
    high: int
    texts: int
    recall: Recall


@dataclass(frozen=True, slots=True)
class Hubs:
    """How often each image is in the top ``k`` results of all texts.

    ``counts`` (N,) are the k-occurrences N_k, ``correct`` (N,) those as a positive. ``skewness`` is
    the third standardised moment of N_k: 0 for a symmetric distribution, high above 1
    (Radovanović, Nanopoulos and Ivanović, "Hubs in Space", JMLR 11, 2010, section 2).
    ``never_retrieved`` is the fraction of images with N_k = 0.
    """

    k: int
    counts: Indexes
    correct: Indexes
    skewness: float
    never_retrieved: float

    def largest(self, count: int) -> Indexes:
        """Return the images with the highest N_k, highest first."""
        return np.argsort(-self.counts, kind="stable")[:count]


@dataclass(frozen=True, slots=True)
class SimilarCaptions:
    """Captions of different images with nearly the same embedding.

    ``pairs`` (P, 2) of texts without a common image, with their ``cosines`` (P,), highest first.
    ``texts`` is the number of texts in a pair; ``complete`` is False if the search stopped early.
    """

    threshold: float
    pairs: Indexes
    cosines: npt.NDArray[Any]
    texts: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Cosines:
    """Histograms of cosines with the edges ``BINS``: of pairs, of non-pairs (a sample of texts with
    all images), and of each text's top result, correct or wrong; ``medians`` of the same four."""

    pairs: Indexes
    non_pairs: Indexes
    top_correct: Indexes
    top_wrong: Indexes
    medians: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Retrieval results of a model on an evaluation set.

    ``texts`` (Q,) are the indexes of texts with an image; ``image_ranks`` (Q,) are the ranks of
    their best positives, ``top_images`` (Q, k) their top results. Likewise ``images`` (R,),
    ``text_ranks`` and ``top_texts`` of images with a text.
    """

    model: str
    texts: Indexes
    image_ranks: Ranks
    top_images: TopK
    images: Indexes
    text_ranks: Ranks
    top_texts: TopK
    lengths: tuple[LengthBin, ...]
    hubs: Hubs
    similar: SimilarCaptions
    cosines: Cosines

    @property
    def text_to_image(self) -> Recall:
        return recall_of(self.image_ranks)

    @property
    def image_to_text(self) -> Recall:
        return recall_of(self.text_ranks)


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric of two models, and the first minus the second with its 95 % interval."""

    metric: str
    first: float
    second: float
    interval: Interval


def diagnose(
    model: str,
    images: Vectors,
    texts: Vectors,
    captions: Sequence[str],
    pairs: Pairs,
    *,
    threshold: float = 0.95,
    seed: int = 0,
    tick: Callable[[int], None] = lambda _: None,
) -> Diagnosis:
    """Measure where retrieval fails.

    Args:
        model: name of the model.
        images: unit vectors (N, D). Unpaired images and texts are gallery distractors.
        texts: unit vectors (M, D).
        captions: the M texts.
        pairs: (P, 2) rows of an image and a text, all that match.
        threshold: cosine from which two captions count as similar.
        seed: of the sample of texts for the histogram.
        tick: called with the number of queries just done.

    Raises:
        UsageError: an embedding is not finite, shapes do not match, or there are no pairs.
    """
    pairs = np.asarray(pairs)
    query_texts, row = np.unique(pairs[:, 1], return_inverse=True)
    image_ranks = ranks_of_best(texts[query_texts], images, np.stack([row, pairs[:, 0]], axis=1))
    top_images = top_k(texts[query_texts], images, min(K, len(images)), tick=tick)
    query_images, row = np.unique(pairs[:, 0], return_inverse=True)
    text_ranks = ranks_of_best(images[query_images], texts, np.stack([row, pairs[:, 1]], axis=1))
    top_texts = top_k(images[query_images], texts, min(K, len(texts)), tick=tick)
    correct = are_positives(query_texts[:, None], top_images.indexes, pairs[:, ::-1], len(images))
    return Diagnosis(
        model,
        query_texts,
        image_ranks,
        top_images,
        query_images,
        text_ranks,
        top_texts,
        recall_by_length([captions[n] for n in query_texts.tolist()], image_ranks),
        hubs_of(top_images.indexes, correct, len(images)),
        similar_captions(texts, pairs, threshold=threshold),
        _cosines(images, texts, pairs, top_images, correct, np.random.default_rng(seed)),
    )


def compare_models(ours: Diagnosis, theirs: Diagnosis, *, seed: int = 0) -> tuple[Difference, ...]:
    """Return the recalls of two models on the same queries and their differences.

    Raises:
        UsageError: the queries differ.
    """
    rows = []
    for metrics, first, second in (
        (_TEXT_TO_IMAGE, ours.image_ranks, theirs.image_ranks),
        (_IMAGE_TO_TEXT, ours.text_ranks, theirs.text_ranks),
    ):
        values: list[tuple[Values, Values]] = [(first < k, second < k) for k in (1, 5, 10)]
        values.append((mean_recall_by_query(first), mean_recall_by_query(second)))
        for metric, (a, b) in zip(metrics, values, strict=True):
            interval = paired_interval(a, b, seed=seed)
            rows.append(Difference(metric, float(a.mean()), float(b.mean()), interval))
    return tuple(rows)


def recall_by_length(captions: Sequence[str], ranks: Ranks) -> tuple[LengthBin, ...]:
    """Return the recall of captions in bins of their number of characters; empty bins are left
    out."""
    lengths = np.array([len(caption) for caption in captions])
    bins = np.searchsorted(_LENGTH_EDGES, lengths, side="right")
    results = []
    for number in np.unique(bins).tolist():
        inside = bins == number
        low, high = int(lengths[inside].min()), int(lengths[inside].max())
        results.append(LengthBin(low, high, int(inside.sum()), recall_of(ranks[inside])))
    return tuple(results)


def hubs_of(results: Indexes, correct: npt.NDArray[np.bool_], gallery: int) -> Hubs:
    """Count the occurrences of each gallery item in the results (Q, k), all and correct ones."""
    counts = np.bincount(results.ravel(), minlength=gallery)
    correct_counts = np.bincount(results[correct], minlength=gallery)
    centred = counts - counts.mean()
    deviation = counts.std()
    skewness = float(np.mean(centred**3) / deviation**3) if deviation else 0.0
    return Hubs(results.shape[1], counts, correct_counts, skewness, float(np.mean(counts == 0)))


def similar_captions(
    texts: Vectors, pairs: Pairs, *, threshold: float, block: int = _BLOCK
) -> SimilarCaptions:
    """Return texts (M, D) with a cosine of at least ``threshold`` and no common image.

    No (M, M) array is allocated; the search stops at a million pairs.
    """
    blocks: list[Indexes] = []
    scores: list[npt.NDArray[Any]] = []
    total, start = 0, 0
    step = max(1, block // len(texts))
    for start in range(0, len(texts), step):
        cosines = texts[start : start + step] @ texts[start:].T  # earlier rows are done
        rows, columns = np.nonzero(np.triu(cosines >= threshold, 1))
        blocks.append(np.stack([rows + start, columns + start], axis=1))
        scores.append(cosines[rows, columns])
        total += len(rows)
        if total >= _MAX_SIMILAR:
            break
    similar = np.concatenate(blocks)
    cosines = np.concatenate(scores)
    different = ~have_common_image(similar, pairs)
    similar, cosines = similar[different], cosines[different]
    order = np.argsort(-cosines, kind="stable")
    return SimilarCaptions(
        threshold,
        similar[order],
        cosines[order],
        len(np.unique(similar)),
        start + step >= len(texts),
    )


def have_common_image(texts: Indexes, pairs: Pairs) -> npt.NDArray[np.bool_]:
    """Return which pairs (P, 2) of texts have a common image."""
    pairs = pairs[np.argsort(pairs[:, 1], kind="stable")]
    first = np.searchsorted(pairs[:, 1], texts[:, 0], side="left")
    count = np.searchsorted(pairs[:, 1], texts[:, 0], side="right") - first
    row = np.repeat(np.arange(len(texts)), count)  # one row per image of the first text
    offset = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    image = pairs[first[row] + offset, 0]
    common = np.zeros(len(texts), bool)
    width = int(pairs[:, 0].max()) + 1
    np.logical_or.at(common, row, are_positives(texts[row, 1], image, pairs[:, ::-1], width))
    return common


def are_positives(
    queries: Indexes, results: Indexes, positives: Pairs, gallery: int
) -> npt.NDArray[np.bool_]:
    """Return which results, rows of a gallery of that size, are positives of their queries."""
    return np.isin(queries * gallery + results, positives[:, 0] * gallery + positives[:, 1])


def _cosines(
    images: Vectors,
    texts: Vectors,
    pairs: Pairs,
    top: TopK,
    correct: npt.NDArray[np.bool_],
    rng: np.random.Generator,
) -> Cosines:
    matching = np.concatenate(
        [
            np.einsum("pd,pd->p", images[part[:, 0]], texts[part[:, 1]])
            for part in np.array_split(pairs, len(pairs) // 10_000 + 1)
        ]
    )
    sample = np.sort(rng.permutation(len(texts))[:_SAMPLE])
    non_pairs = np.zeros(len(BINS) - 1, np.int64)
    step = max(1, _BLOCK // len(images))
    for start in range(0, len(sample), step):
        non_pairs += _histogram((texts[sample[start : start + step]] @ images.T).ravel())
    sampled = np.isin(pairs[:, 1], sample)
    # Not below 0: the same cosine computed twice may round into another bin.
    non_pairs = np.maximum(non_pairs - _histogram(matching[sampled]), 0)
    cosines, hit = top.scores[:, 0], correct[:, 0]
    return Cosines(
        _histogram(matching),
        non_pairs,
        _histogram(cosines[hit]),
        _histogram(cosines[~hit]),
        medians=(
            _median(matching),
            _histogram_median(non_pairs),
            _median(cosines[hit]),
            _median(cosines[~hit]),
        ),
    )


def _histogram(cosines: npt.NDArray[Any]) -> Indexes:
    """Count cosines by bin, clipped: rounding may exceed 1."""
    return np.histogram(cosines.clip(-1, 1), BINS)[0]


def _median(values: npt.NDArray[Any]) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def _histogram_median(counts: Indexes) -> float:
    """Return the middle of the bin with the median."""
    if not counts.sum():
        return float("nan")
    bin_index = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    return float((BINS[bin_index] + BINS[bin_index + 1]) / 2)

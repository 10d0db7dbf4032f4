"""Where a model's recall is lost: long captions, hubs, captions alike, the worst misses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.eval.metrics.bootstrap import Interval, Values, paired_interval
from cn_clip.eval.metrics.recall import Pairs, Ranks, Recall, ranks_of_best, recall_at
from cn_clip.eval.robustness.measure import hits
from cn_clip.topk import TopK, Vectors, top_k

K = 10  # how many of the first answers a hub is counted in
_EDGES = (1, 3, 5, 7, 9, 12, 16, 24, 32, 48)  # characters, where the classes of length begin
_SAMPLE = 2_000  # texts whose cosines to every image are counted
_BLOCK = 1 << 22  # cosines at a time, 16 MiB
_ALIKE = 1_000_000  # pairs of captions alike that are held, 16 MB
BINS = np.linspace(-1, 1, 201)  # of the histograms of cosines

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Length:
    """Recall of the ``texts`` of ``low`` to ``high`` characters."""

    low: int
    high: int
    texts: int
    recall: Recall


@dataclass(frozen=True, slots=True)
class Hubs:
    """How often each image is among the first ``k`` answers of all texts.

    ``counts`` (N,) are the k-occurrences N_k, ``right`` (N,) how many of them were right.
    ``skewness`` is their third standardised moment: 0 if all images are found alike, above 1 is
    much (Radovanović, Nanopoulos and Ivanović, "Hubs in Space", JMLR 11, 2010, section 2).
    ``never`` is the share of images that no text finds.
    """

    k: int
    counts: Numbers
    right: Numbers
    skewness: float
    never: float

    def most(self, number: int) -> Numbers:
        """Return the images that are found most often, the most frequent first."""
        return np.argsort(-self.counts, kind="stable")[:number]


@dataclass(frozen=True, slots=True)
class Alike:
    """Captions of different images that the model hardly tells apart.

    ``pairs`` (P, 2) of texts with their ``cosines`` (P,), the most alike first; no two of them have
    an image in common. ``texts`` have such another. ``complete`` is whether all were held.
    """

    threshold: float
    pairs: Numbers
    cosines: npt.NDArray[Any]
    texts: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Cosines:
    """Counts of cosines between the edges ``BINS``: of what belongs together, of what does not
    (texts drawn with a seed, each with every image), and of each text's first answer, where it
    is right and where it is wrong. The ``medians`` are of the same four."""

    matching: Numbers
    others: Numbers
    first_right: Numbers
    first_wrong: Numbers
    medians: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What one model does with the images and texts of a set.

    ``texts`` (Q,) are the numbers of those that have an image, and ask for it; ``to_image`` (Q,)
    are the ranks of their best positives, ``images_found`` (Q, k) their first answers. Likewise
    ``images`` (R,), ``to_text`` and ``texts_found`` of the images that have a text.
    """

    model: str
    texts: Numbers
    to_image: Ranks
    images_found: TopK
    images: Numbers
    to_text: Ranks
    texts_found: TopK
    lengths: tuple[Length, ...]
    hubs: Hubs
    alike: Alike
    cosines: Cosines

    @property
    def text_to_image(self) -> Recall:
        return recall_of(self.to_image)

    @property
    def image_to_text(self) -> Recall:
        return recall_of(self.to_text)


@dataclass(frozen=True, slots=True)
class Difference:
    """A measure of two models, and the first less the second with its 95 % interval."""

    measure: str
    first: float
    second: float
    lead: Interval


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
    """Find where recall is lost.

    Args:
        model: its name.
        images: unit vectors (N, D). What is in no pair is there to be found by mistake.
        texts: unit vectors (M, D), likewise.
        captions: the M texts.
        pairs: rows (P, 2), an image's and a text's, of all that belong together.
        threshold: two captions are alike from this cosine on.
        seed: of the texts drawn for the histogram.
        tick: called with the number of queries just done.

    Raises:
        UsageError: an embedding is not finite, shapes do not fit, or there are no pairs.
    """
    pairs = np.asarray(pairs)
    of_text, place = np.unique(pairs[:, 1], return_inverse=True)
    to_image = ranks_of_best(texts[of_text], images, np.stack([place, pairs[:, 0]], axis=1))
    images_found = top_k(texts[of_text], images, min(K, len(images)), tick=tick)
    of_image, place = np.unique(pairs[:, 0], return_inverse=True)
    to_text = ranks_of_best(images[of_image], texts, np.stack([place, pairs[:, 1]], axis=1))
    texts_found = top_k(images[of_image], texts, min(K, len(texts)), tick=tick)
    right = belong(of_text[:, None], images_found.indexes, pairs[:, ::-1], len(images))
    return Diagnosis(
        model,
        of_text,
        to_image,
        images_found,
        of_image,
        to_text,
        texts_found,
        by_length([captions[n] for n in of_text.tolist()], to_image),
        hubs_of(images_found.indexes, right, len(images)),
        alike(texts, pairs, threshold=threshold),
        _cosines(images, texts, pairs, images_found, right, np.random.default_rng(seed)),
    )


def compare(ours: Diagnosis, theirs: Diagnosis, *, seed: int = 0) -> tuple[Difference, ...]:
    """Return the recalls of two models on the same queries, with what the first is ahead.

    Raises:
        UsageError: they were not diagnosed on the same queries.
    """
    rows = []
    for way, first, second in (
        ("text to image", ours.to_image, theirs.to_image),
        ("image to text", ours.to_text, theirs.to_text),
    ):
        values: list[tuple[str, Values, Values]] = [
            (f"R@{k}", first < k, second < k) for k in (1, 5, 10)
        ]
        values.append(("mean recall", hits(first), hits(second)))
        for name, a, b in values:
            lead = paired_interval(a, b, seed=seed)
            rows.append(Difference(f"{way}, {name}", float(a.mean()), float(b.mean()), lead))
    return tuple(rows)


def recall_of(ranks: Ranks) -> Recall:
    """Return recall at 1, 5 and 10."""
    return Recall(recall_at(ranks, 1), recall_at(ranks, 5), recall_at(ranks, 10))


def by_length(captions: Sequence[str], ranks: Ranks) -> tuple[Length, ...]:
    """Return the recall of captions by their number of characters, in classes that are not
    empty."""
    lengths = np.array([len(caption) for caption in captions])
    classes = np.searchsorted(_EDGES, lengths, side="right")
    found = []
    for each in np.unique(classes).tolist():
        here = classes == each
        within = lengths[here]
        recall = recall_of(ranks[here])
        found.append(Length(int(within.min()), int(within.max()), int(here.sum()), recall))
    return tuple(found)


def hubs_of(found: Numbers, right: npt.NDArray[np.bool_], gallery: int) -> Hubs:
    """Count how often each of a gallery is in the answers (Q, k), and how often rightly."""
    counts = np.bincount(found.ravel(), minlength=gallery)
    rightly = np.bincount(found[right], minlength=gallery)
    spread = counts - counts.mean()
    deviation = counts.std()
    skewness = float(np.mean(spread**3) / deviation**3) if deviation else 0.0
    return Hubs(found.shape[1], counts, rightly, skewness, float(np.mean(counts == 0)))


def alike(texts: Vectors, pairs: Pairs, *, threshold: float, block: int = _BLOCK) -> Alike:
    """Find texts (M, D) with a cosine of ``threshold`` or more that have no image in common.

    No (M, M) array is made; once a million pairs are held, the search ends.
    """
    found: list[Numbers] = []
    scores: list[npt.NDArray[Any]] = []
    held, at = 0, 0
    step = max(1, block // len(texts))
    for at in range(0, len(texts), step):
        cosines = texts[at : at + step] @ texts[at:].T  # the rows before are done
        rows, columns = np.nonzero(np.triu(cosines >= threshold, 1))
        found.append(np.stack([rows + at, columns + at], axis=1))
        scores.append(cosines[rows, columns])
        held += len(rows)
        if held >= _ALIKE:
            break
    together = np.concatenate(found)
    cosines = np.concatenate(scores)
    apart = ~share(together, pairs)
    together, cosines = together[apart], cosines[apart]
    order = np.argsort(-cosines, kind="stable")
    return Alike(
        threshold,
        together[order],
        cosines[order],
        len(np.unique(together)),
        at + step >= len(texts),
    )


def share(texts: Numbers, pairs: Pairs) -> npt.NDArray[np.bool_]:
    """Tell which pairs (P, 2) of texts have an image in common."""
    pairs = pairs[np.argsort(pairs[:, 1], kind="stable")]
    first = np.searchsorted(pairs[:, 1], texts[:, 0], side="left")
    count = np.searchsorted(pairs[:, 1], texts[:, 0], side="right") - first
    row = np.repeat(np.arange(len(texts)), count)  # a row for each image of the first text
    place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    image = pairs[first[row] + place, 0]
    common = np.zeros(len(texts), bool)
    width = int(pairs[:, 0].max()) + 1
    np.logical_or.at(common, row, belong(texts[row, 1], image, pairs[:, ::-1], width))
    return common


def belong(
    queries: Numbers, answers: Numbers, positives: Pairs, gallery: int
) -> npt.NDArray[np.bool_]:
    """Tell which answers, of a gallery of that size, are positives of their queries."""
    return np.isin(queries * gallery + answers, positives[:, 0] * gallery + positives[:, 1])


def _cosines(
    images: Vectors,
    texts: Vectors,
    pairs: Pairs,
    found: TopK,
    right: npt.NDArray[np.bool_],
    rng: np.random.Generator,
) -> Cosines:
    matching = np.concatenate(
        [
            np.einsum("pd,pd->p", images[part[:, 0]], texts[part[:, 1]])
            for part in np.array_split(pairs, len(pairs) // 10_000 + 1)
        ]
    )
    drawn = np.sort(rng.permutation(len(texts))[:_SAMPLE])
    others = np.zeros(len(BINS) - 1, np.int64)
    step = max(1, _BLOCK // len(images))
    for at in range(0, len(drawn), step):
        some = drawn[at : at + step]
        others += _counted((texts[some] @ images.T).ravel())
    mine = np.isin(pairs[:, 1], drawn)
    others = np.maximum(others - _counted(matching[mine]), 0)  # a rounded cosine may change its bin
    first, hit = found.scores[:, 0], right[:, 0]
    medians = (
        _median(matching),
        _middle(others),
        _median(first[hit]),
        _median(first[~hit]),
    )
    counted = (_counted(matching), others, _counted(first[hit]), _counted(first[~hit]))
    return Cosines(*counted, medians=medians)


def _counted(cosines: npt.NDArray[Any]) -> Numbers:
    """Count cosines by bin; rounding may have put one just beyond 1."""
    return np.histogram(cosines.clip(-1, 1), BINS)[0]


def _median(values: npt.NDArray[Any]) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def _middle(counts: Numbers) -> float:
    """Return the middle of the bin that holds the median."""
    if not counts.sum():
        return float("nan")
    at = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    return float((BINS[at] + BINS[at + 1]) / 2)

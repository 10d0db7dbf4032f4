"""Whether the best result of a search matches at all, and how probable each result is.

The top of many images has a high cosine even when nothing matches, and the more images, the higher.
Two models correct for the number of images N:

- The **estimate** needs no labels. Generic Chinese words, embedded once, are compared with a sample
  of the library. Nearly all of these pairs do not belong together, so their cosines show how
  frequent each cosine is by chance, ``S(c)``; the chance that the best of N unrelated images
  reaches c is ``1 - (1 - S(c)) ** N``. Beyond the sample, the tail is a power law that ends at a
  cosine of 1, ``S(c) = S(u) * ((1 - c) / (1 - u)) ** exponent`` (a generalised Pareto tail with
  a known end point; its exponent is fitted as by Hill, Annals of Statistics 3, 1975).
- A **calibration** of the model (``cn_clip.calibration``) gives the ratio of matching to
  non-matching pairs at a cosine. The prior is that one image of N matches with the calibration's
  prior probability.

A result is rejected if the chance is above ``false_accepts``, whatever the query. Statistics of the
query itself, such as a z-score against its own cosines, accept fewer present things, or not
significantly more, than a cutoff on the cosine; ``benchmarks/no_match.py`` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.calibration import Calibration, check_model, probability, read_calibration
from cn_clip.embedder import Embedder
from cn_clip.errors import UsageError
from cn_clip.hub import EMBEDDED_FOLDER
from cn_clip.search.query import Query
from cn_clip.translation import _

FALSE_ACCEPTS = 0.1
SAMPLE = 4096  # images of a library that are enough

_TAIL = 0.005  # of the cosines: those that the power law is fitted to
_GRID = 64  # points of the distribution below
_COMPOSED = 250  # random queries of the form of a query of several terms: fitted for each search
_END = 1 - 1e-6  # cosines of equal images are rounded

Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tail:
    """How frequent high cosines are between queries and images that do not belong together.

    Attributes:
        cosines: increasing.
        fractions: of pairs that have at least this cosine, from 1 decreasing.
        exponent: of the power law beyond the last cosine.
    """

    cosines: tuple[float, ...]
    fractions: tuple[float, ...]
    exponent: float

    def above(self, cosines: npt.ArrayLike) -> Floats:
        """Return the fraction of pairs with at least these cosines, of the same shape."""
        cosines = np.asarray(cosines, np.float64)
        last, fraction = self.cosines[-1], self.fractions[-1]
        within = np.exp(np.interp(cosines, self.cosines, np.log(self.fractions)))
        rest = np.clip(1 - cosines, 0, None) / (1 - last)
        beyond = fraction * np.minimum(rest, 1) ** self.exponent
        result: Floats = np.where(cosines > last, beyond, within)
        return result

    def cosine(self, fraction: float) -> float:
        """Return the cosine that this fraction of pairs reaches: the inverse of ``above``."""
        if fraction >= self.fractions[-1]:
            logs = np.log(self.fractions[::-1])
            return float(np.interp(np.log(fraction), logs, self.cosines[::-1]))
        ratio = (fraction / self.fractions[-1]) ** (1 / self.exponent)
        return float(1 - (1 - self.cosines[-1]) * ratio)


@dataclass(frozen=True, slots=True)
class Confidence:
    """What cosines of a query mean in a library of ``images`` images.

    Attributes:
        tail: of the library, from ``fit_tail``.
        images: N, the number of images that the query is compared with: after filters.
        calibration: of the model; None for an estimate, and for queries that are not one phrase:
            calibrations are of single captions.
        false_accepts: fraction of queries without a match whose best result is accepted.
    """

    tail: Tail
    images: int
    calibration: Calibration | None = None
    false_accepts: float = FALSE_ACCEPTS

    def __post_init__(self) -> None:
        if not 0 < self.false_accepts < 1:
            raise UsageError(
                _(
                    "false_accepts is {value}, not between 0 and 1; the default is {default}",
                    value=self.false_accepts,
                    default=FALSE_ACCEPTS,
                )
            )

    @property
    def _count(self) -> int:
        return max(1, self.images)  # an empty selection has no best result, but a threshold

    @property
    def estimated(self) -> bool:
        """Whether ``probability`` is an estimate without labels."""
        return self.calibration is None

    @property
    def threshold(self) -> float:
        """The cosine below which the best result is rejected.

        It is that of the calibration for ``search``, if there is one, moved from the number of
        images that it was fitted on to N, so that the chance stays the same. Otherwise it is where
        the chance is ``false_accepts``.
        """
        fitted = None if self.calibration is None else self.calibration.thresholds["search"]
        if self.calibration is None or fitted is None:
            return self.tail.cosine(-np.expm1(np.log1p(-self.false_accepts) / self._count))
        moved = self.tail.above(fitted) * self.calibration.counts["images"] / self._count
        return self.tail.cosine(float(np.clip(moved, 1e-300, 1)))

    def accepts(self, best: float) -> bool:
        """Return whether the best result of a query, with this cosine, is accepted; if not, nothing
        in the library matches."""
        return float(best) >= self.threshold

    def chance(self, cosines: npt.ArrayLike) -> Floats:
        """Return the chance that the best of N unrelated images has at least these cosines."""
        with np.errstate(divide="ignore"):  # every pair has at least a very low cosine
            result: Floats = -np.expm1(self._count * np.log1p(-self.tail.above(cosines)))
        return result

    def probability(self, cosines: npt.ArrayLike) -> Floats:
        """Return the probability that each result matches, float64 of the shape of ``cosines``.

        With a calibration it is the posterior for a prior of ``calibration.prior / N`` for each
        image. The estimate is (1 - B) / (1 + B), where B is the least Bayes factor for chance
        (Sellke, Bayarri and Berger, American Statistician 55, 2001, equation 2): 0 for results that
        chance explains, near 1 for those that it does not. It ranks results; it is less exact.
        """
        result: Floats
        if self.calibration is not None:
            pair, prior = probability(self.calibration.curve, cosines), self.calibration.prior
            image = prior / self._count
            match = pair * (1 - prior) / prior * image
            result = match / (match + (1 - pair) * (1 - image))
            return result
        chance = np.clip(self.chance(cosines), 1e-300, 1 / np.e)
        bayes_factor = -np.e * chance * np.log(chance)
        result = (1 - bayes_factor) / (1 + bayes_factor)
        return result


def calibration_of(embedder: Embedder, path: Path | None = None) -> Calibration | None:
    """Return the calibration of a model: from a file, or the one of ``mini`` in the package.

    Without a file, the one in the package holds for ``mini`` and its other precisions and runtimes;
    None for other models.

    Raises:
        UsageError: the file is not a calibration, or is of another model (see ``check_model``).
    """
    if path is not None:
        calibration = read_calibration(path)
        check_model(calibration, embedder)
        return calibration
    calibration = read_calibration(EMBEDDED_FOLDER / "calibration.json")
    own = (embedder.fingerprint, embedder.derived_from)
    return calibration if calibration.fingerprint in own else None


@cache
def background_words() -> tuple[str, ...]:
    """Return generic Chinese nouns, to be embedded once for each model."""
    text = files("cn_clip").joinpath("search/words.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def tail_of(query: Query, words: Vectors, sample: Vectors, *, seed: int = 0) -> Tail:
    """Fit the tail for queries of the form of ``query``.

    A phrase is compared with single words; the tail is then the same for all phrases and can be
    kept. Several terms are compared with sums of random words and images of the same weights.

    Args:
        query: only the number, kinds and weights of its terms count.
        words: embeddings (B, D) of ``background_words``.
        sample: embeddings (S, D) of random images of the library; ``SAMPLE`` are enough. Rows of
            zeros, of missing images, do not count.
        seed: of the random words and images.

    Raises:
        UsageError: the sample is empty.
    """
    sample = sample[np.any(sample != 0, axis=1)]
    if query.is_phrase:
        return fit_tail(words, sample)
    rng = np.random.default_rng(seed)
    others = sample  # of images in a query: not those that they are compared with
    if (query.images or query.like) and len(sample) > 1:
        others, sample = sample[::2], sample[1::2]
    parts = [(words, term.weight) for term in query.terms]
    parts += [(others, weight) for _image, weight in (*query.images, *query.like)]
    total = np.zeros((_COMPOSED, words.shape[1]))
    for vectors, weight in parts:
        if len(vectors):
            drawn = vectors[rng.integers(0, len(vectors), _COMPOSED)]
            total += weight * drawn.astype(np.float64)
    lengths = np.linalg.norm(total, axis=1, keepdims=True)
    return fit_tail(total / np.maximum(lengths, 1e-12), sample)


def fit_tail(queries: Vectors, sample: Vectors) -> Tail:
    """Fit the tail of the cosines between unrelated queries (B, D) and images (S, D).

    Raises:
        UsageError: there are no queries or no images.
    """
    if not len(queries) or not len(sample):
        raise UsageError(_("the library has no images to compare with; index some first"))
    scores = (np.asarray(queries, np.float32) @ np.asarray(sample, np.float32).T).ravel()
    scores.sort()
    fractions = np.geomspace(1, _TAIL, _GRID)
    rows = np.round((1 - fractions) * (len(scores) - 1)).astype(np.int64)
    cosines = np.minimum(scores[rows].astype(np.float64), _END)
    beyond = np.minimum(scores[rows[-1] + 1 :].astype(np.float64), _END)
    logs = np.log((1 - cosines[-1]) / (1 - beyond))
    exponent = 1 / max(float(logs.mean()), 1e-3) if len(logs) else 1e3
    return Tail(tuple(cosines.tolist()), tuple(fractions.tolist()), exponent)

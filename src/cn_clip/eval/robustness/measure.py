"""Recall lost on rewritten queries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.embedder import Embedder
from cn_clip.eval.metrics.bootstrap import Interval, paired_interval
from cn_clip.eval.metrics.recall import (
    Pairs,
    Recall,
    mean_recall_by_query,
    ranks_of_best,
    recall_of,
)
from cn_clip.eval.robustness.rewrites import Rewrite
from cn_clip.normalize import normalized
from cn_clip.tokenizer import TruncationWarning
from cn_clip.topk import Vectors
from cn_clip.translation import N_


@dataclass(frozen=True, slots=True)
class RewriteResult:
    """Recall on the queries one rewrite changes, before and after.

    ``changed`` is their number, ``loss`` the mean recall of ``original`` minus ``rewritten``, and
    ``loss_overall`` the loss averaged over all queries; unchanged queries lose nothing. Measured
    values are None if no query is changed. ``example`` is a query before and after.
    """

    name: str
    description: str
    changed: int
    original: Recall | None
    rewritten: Recall | None
    loss: Interval | None
    loss_overall: float
    example: tuple[str, str] | None


@dataclass(frozen=True, slots=True)
class Robustness:
    """Text-to-image recall of the ``original`` queries, and the result of each rewrite.

    ``normalized`` are the results of the same rewrites, each query normalised before embedding,
    against original queries without normalisation; the first one is the original queries
    normalised. Empty without normalizers.
    """

    queries: int
    original: Recall
    results: tuple[RewriteResult, ...]
    normalizers: tuple[str, ...]
    normalized: tuple[RewriteResult, ...]


def robustness(
    embedder: Embedder,
    images: Vectors,
    texts: Sequence[str],
    pairs: Pairs,
    rewrites: Sequence[Rewrite],
    *,
    normalizers: Sequence[str] = (),
    seed: int = 0,
    tick: Callable[[int], None] = lambda _: None,
) -> Robustness:
    """Measure recall on original and rewritten queries.

    Args:
        embedder: embeds the texts.
        images: embeddings (N, D) of the same model.
        texts: M texts, each once; texts without an image are not queries.
        pairs: (P, 2) rows of an image and a text, all that match.
        rewrites: from ``cn_clip.eval.robustness.rewrites.all_rewrites``.
        normalizers: names from ``cn_clip.normalize.NORMALIZERS``, applied in this order.
        seed: of the bootstrap.
        tick: called with 1 after each rewrite, with and without normalizers.

    Raises:
        UsageError: shapes do not match, a normalizer is unknown, or OpenCC is not installed but
            needed.
    """
    with_image, row = np.unique(np.asarray(pairs)[:, 1], return_inverse=True)
    texts = [texts[n] for n in with_image.tolist()]
    positives = np.stack([row, np.asarray(pairs)[:, 0]], axis=1)
    cache: dict[str, npt.NDArray[Any]] = {}
    ranks = ranks_of_best(_embed(embedder, texts, cache), images, positives)

    def measure(name: str, description: str, rewrite: Callable[[str], str]) -> RewriteResult:
        rewritten = [rewrite(text) for text in texts]
        changed = [n for n, text in enumerate(rewritten) if text != texts[n]]
        rows = np.array(changed, np.int64)
        tick(1)
        if not changed:
            return RewriteResult(name, description, 0, None, None, None, 0.0, None)
        queries = _embed(embedder, [rewritten[n] for n in changed], cache)
        new_ranks = ranks_of_best(queries, images, _positives_of(rows, positives))
        loss = paired_interval(
            mean_recall_by_query(ranks[rows]), mean_recall_by_query(new_ranks), seed=seed
        )
        return RewriteResult(
            name,
            description,
            len(changed),
            recall_of(ranks[rows]),
            recall_of(new_ranks),
            loss,
            loss.value * len(changed) / len(texts),
            (texts[changed[0]], rewritten[changed[0]]),
        )

    results = tuple(measure(r.name, r.description, r.apply) for r in rewrites)
    normalized_results: tuple[RewriteResult, ...] = ()
    if normalizers:

        def normalize(text: str) -> str:
            return normalized(text, normalizers)

        def rewrite_and_normalize(rewrite: Rewrite) -> Callable[[str], str]:
            # Queries that the rewrite does not change are measured in the first row.
            return lambda text: normalize(new) if (new := rewrite.apply(text)) != text else text

        normalized_results = (
            measure(N_("plain"), N_("the original text"), normalize),
            *(measure(r.name, r.description, rewrite_and_normalize(r)) for r in rewrites),
        )
    return Robustness(len(texts), recall_of(ranks), results, tuple(normalizers), normalized_results)


def _positives_of(rows: npt.NDArray[np.int64], positives: Pairs) -> Pairs:
    """Return the positives of some queries, sorted and distinct, numbered among them."""
    kept = positives[np.isin(positives[:, 0], rows)]
    return np.stack([np.searchsorted(rows, kept[:, 0]), kept[:, 1]], axis=1)


def _embed(embedder: Embedder, texts: Sequence[str], cache: dict[str, npt.NDArray[Any]]) -> Vectors:
    """Embed texts; those in the cache are not embedded again."""
    new = list(dict.fromkeys(text for text in texts if text not in cache))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # some rewrites are too long on purpose
        cache.update(zip(new, embedder.embed_texts(new), strict=True))
    return np.stack([cache[text] for text in texts])

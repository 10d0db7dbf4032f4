"""What recall is lost when the same images are asked for in another way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.embedder import Embedder
from cn_clip.eval.metrics.bootstrap import Interval, paired_interval
from cn_clip.eval.metrics.recall import Pairs, Ranks, Recall, ranks_of_best, recall_at
from cn_clip.eval.robustness.rewrites import Variant, normalized
from cn_clip.tokenizer import TruncationWarning
from cn_clip.topk import Vectors


@dataclass(frozen=True, slots=True)
class Asked:
    """The texts that a way of asking changes, plain and so asked.

    ``changed`` of all texts are. ``lost`` is the mean recall of the plain less that of the changed,
    over them; the other texts lose nothing, so over all texts it is ``lost_overall``. What is
    measured is None where nothing is changed.
    """

    name: str
    meaning: str
    changed: int
    plain: Recall | None
    asked: Recall | None
    lost: Interval | None
    lost_overall: float
    example: tuple[str, str] | None


@dataclass(frozen=True, slots=True)
class Robustness:
    """Recall from text to image of ``queries`` plain texts, and of every way to ask.

    ``normalized`` are the same ways, each query normalised before it is embedded, compared with
    plain texts that are not; its first is the plain texts, normalised. Empty without normalisers.
    """

    queries: int
    plain: Recall
    asked: tuple[Asked, ...]
    normalizers: tuple[str, ...]
    normalized: tuple[Asked, ...]


def robustness(
    embedder: Embedder,
    images: Vectors,
    texts: Sequence[str],
    pairs: Pairs,
    ways: Sequence[Variant],
    *,
    normalizers: Sequence[str] = (),
    seed: int = 0,
    tick: Callable[[int], None] = lambda _: None,
) -> Robustness:
    """Ask for the same images in other ways, and measure what is lost.

    Args:
        embedder: embeds the texts.
        images: embeddings (N, D) by the same model.
        texts: M texts, each once; those without an image are not asked with.
        pairs: rows (P, 2), an image's and a text's, that belong together.
        ways: from ``cn_clip.eval.robustness.rewrites.variants``.
        normalizers: names out of ``rewrites.NORMALIZERS``, applied in this order.
        seed: of the bootstrap.
        tick: called with 1 after each way, with and without normalisers: for a progress bar.

    Raises:
        UsageError: embeddings and pairs do not fit, a normaliser is not known, or OpenCC is needed
            and not installed.
    """
    asking, place = np.unique(np.asarray(pairs)[:, 1], return_inverse=True)
    texts = [texts[n] for n in asking.tolist()]
    positives = np.stack([place, np.asarray(pairs)[:, 0]], axis=1)
    memory: dict[str, npt.NDArray[Any]] = {}
    ranks = ranks_of_best(_embed(embedder, texts, memory), images, positives)

    def measure(name: str, meaning: str, ask: Callable[[str], str]) -> Asked:
        new = [ask(text) for text in texts]
        rows = np.array([n for n, text in enumerate(new) if text != texts[n]], np.int64)
        tick(1)
        if not len(rows):
            return Asked(name, meaning, 0, None, None, None, 0.0, None)
        queries = _embed(embedder, [new[n] for n in rows.tolist()], memory)
        asked = ranks_of_best(queries, images, _of(rows, positives))
        lost = paired_interval(hits(ranks[rows]), hits(asked), seed=seed)
        first = int(rows[0])
        return Asked(
            name,
            meaning,
            len(rows),
            _recall(ranks[rows]),
            _recall(asked),
            lost,
            lost.value * len(rows) / len(texts),
            (texts[first], new[first]),
        )

    asked = tuple(measure(way.name, way.meaning, way.ask) for way in ways)
    tidied: tuple[Asked, ...] = ()
    if normalizers:

        def tidy(text: str) -> str:
            return normalized(text, normalizers)

        def tidied_way(way: Variant) -> Callable[[str], str]:
            # Only what the way changes: the rest is the first row's.
            return lambda text: tidy(new) if (new := way.ask(text)) != text else text

        tidied = (
            measure("plain", "as the data have it", tidy),
            *(measure(way.name, way.meaning, tidied_way(way)) for way in ways),
        )
    return Robustness(len(texts), _recall(ranks), asked, tuple(normalizers), tidied)


def hits(ranks: Ranks) -> npt.NDArray[np.float64]:
    """Return each query's share (Q,) of mean recall: the mean of its hits at 1, 5 and 10."""
    shares: npt.NDArray[np.float64] = np.mean(
        [ranks < 1, ranks < 5, ranks < 10], axis=0, dtype=np.float64
    )
    return shares


def _recall(ranks: Ranks) -> Recall:
    return Recall(recall_at(ranks, 1), recall_at(ranks, 5), recall_at(ranks, 10))


def _of(rows: npt.NDArray[np.int64], positives: Pairs) -> Pairs:
    """Return the positives of some queries, sorted and once each, by their place among them."""
    kept = positives[np.isin(positives[:, 0], rows)]
    return np.stack([np.searchsorted(rows, kept[:, 0]), kept[:, 1]], axis=1)


def _embed(
    embedder: Embedder, texts: Sequence[str], memory: dict[str, npt.NDArray[Any]]
) -> Vectors:
    """Embed texts, those that were embedded before out of memory."""
    new = list(dict.fromkeys(text for text in texts if text not in memory))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # some are made too long on purpose
        memory.update(zip(new, embedder.embed_texts(new), strict=True))
    return np.stack([memory[text] for text in texts])

"""Retrieval recall of a model on image-text pairs, or of stored features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cn_clip.data.sources.official import parse_id
from cn_clip.data.sources.open import WeightedSource
from cn_clip.embedder import Embedder
from cn_clip.embeddings.files import StoredEmbeddings
from cn_clip.errors import DataError
from cn_clip.eval.dataset import EvalSet, eval_set_of
from cn_clip.eval.images import embed_eval_images
from cn_clip.eval.metrics.recall import Retrieval, retrieval
from cn_clip.topk import Vectors
from cn_clip.translation import _

Tick = Callable[[int, int], None]
Id = str | int


@dataclass(frozen=True, slots=True)
class RetrievalResult:
    """Recall on pairs, with the data it was computed from.

    Attributes:
        model: name of the model, or path of the image features.
        recall: in both directions.
        image_ids: of the N images; integers where the official files have integers. Row numbers
            from 0 if the ids are not unique, as with several sources.
        text_ids: of the M texts, likewise.
        captions: the M texts; empty if only features are given.
        images: embeddings (N, D).
        texts: embeddings (M, D).
        pairs: (P, 2) rows of an image and a text, all that match.
        failed: a message for each unreadable row or image, which are excluded.
    """

    model: str
    recall: Retrieval
    image_ids: list[Id]
    text_ids: list[Id]
    captions: list[str]
    images: Vectors
    texts: Vectors
    pairs: npt.NDArray[np.int64]
    failed: list[str] = field(default_factory=list)


def evaluate_retrieval(
    embedder: Embedder,
    mix: Sequence[WeightedSource],
    *,
    merge: bool = True,
    tick: Tick = lambda done, total: None,
) -> RetrievalResult:
    """Measure recall at 1, 5 and 10 on pairs, in both directions.

    Args:
        embedder: a loaded model.
        mix: sources of pairs, from ``open_mix``; each image and text is embedded once.
        merge: as in ``eval_set_of``; False counts texts as the official evaluation does.
        tick: called with the number of images and texts done, and of all.

    Raises:
        DataError: there is no readable pair.
    """
    return measure(embedder, eval_set_of(mix, merge=merge), tick=tick)


def measure(
    embedder: Embedder,
    dataset: EvalSet,
    *,
    tick: Tick = lambda done, total: None,
) -> RetrievalResult:
    """Measure recall on an evaluation set, like ``evaluate_retrieval``."""
    total, done = len(dataset.images) + len(dataset.texts), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        tick(done, total)

    images = embed_eval_images(embedder, dataset, tick=advance)
    texts = embedder.embed_texts(dataset.texts)
    tick(total, total)
    return RetrievalResult(
        embedder.name,
        retrieval(images.vectors, texts, images.pairs),
        _unique([dataset.image_ids[n] for n in images.indexes.tolist()]),
        _unique(dataset.text_ids),
        dataset.texts,
        images.vectors,
        texts,
        images.pairs,
        list(dataset.skipped),
    )


def evaluate_features(
    images: StoredEmbeddings,
    texts: StoredEmbeddings,
    pairs: Iterable[tuple[str, str]],
    *,
    truth: str,
) -> RetrievalResult:
    """Measure recall of stored features, compared by dot product without normalisation.

    Args:
        images: from ``read_embeddings``.
        texts: likewise.
        pairs: image id and text id of all matching pairs; pairs with an empty id are ignored.
        truth: where the pairs are from, for messages.

    Raises:
        DataError: an id of a pair has no features, or there is no pair.
        UsageError: the vectors have different dimensions.
    """
    unique = list(dict.fromkeys(pair for pair in pairs if all(pair)))
    for stored, side, what in ((images, 0, "image"), (texts, 1, "text")):
        known = set(stored.ids)
        missing = dict.fromkeys(pair[side] for pair in unique if pair[side] not in known)
        if missing:
            raise DataError(
                _(
                    "{missing_count:,} of the {what} ids in {truth} are not in {path}, such as "
                    "{missing!r}; embed the whole split",
                    missing_count=len(missing),
                    what=what,
                    truth=truth,
                    path=stored.path,
                    missing=next(iter(missing)),
                )
            )
        norms = np.linalg.norm(stored.vectors, axis=1)
        if not np.allclose(norms, 1, atol=0.01):
            warnings.warn(
                _(
                    "{path}: vector lengths are {shortest:.3g} to {longest:.3g}, not 1; vectors "
                    "are compared without normalisation",
                    path=stored.path,
                    shortest=norms.min(),
                    longest=norms.max(),
                ),
                stacklevel=2,
            )
    image_rows, text_rows = (
        {key: row for row, key in enumerate(stored.ids)} for stored in (images, texts)
    )
    rows = [(image_rows[image], text_rows[text]) for image, text in unique]
    row_pairs = np.array(rows, np.int64).reshape(-1, 2)
    return RetrievalResult(
        str(images.path),
        retrieval(images.vectors, texts.vectors, row_pairs),
        [parse_id(key) for key in images.ids],
        [parse_id(key) for key in texts.ids],
        [],
        images.vectors,
        texts.vectors,
        row_pairs,
    )


def pairs_of(mix: Sequence[WeightedSource]) -> list[tuple[str, str]]:
    """Return the image id and the text id of every pair; no image is opened.

    Raises:
        DataError: a row is unreadable.
    """
    rows = (part.source.row(index) for part in mix for index in range(len(part.source)))
    return [(row.image_id, row.text_id) for row in rows if row.image_id and row.text_id]


def _unique(ids: list[str]) -> list[Id]:
    return [parse_id(key) for key in ids] if len(set(ids)) == len(ids) else list(range(len(ids)))

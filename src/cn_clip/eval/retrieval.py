"""How well a model finds pictures by texts and texts by pictures, on any pairs or features."""

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
from cn_clip.eval.images import embed_pictures
from cn_clip.eval.metrics.recall import Retrieval, retrieval
from cn_clip.topk import Vectors

Tick = Callable[[int, int], None]
Id = str | int


@dataclass(frozen=True, slots=True)
class Measured:
    """Recall on pairs, and all it was computed from.

    Attributes:
        model: its name, or where its features lie.
        recall: in both directions.
        image_ids: of N pictures; numbers where the official files have numbers. Where the data's
            ids are not unique, as of several sources, rows are counted from 0 instead.
        text_ids: of M texts, likewise.
        captions: the M texts, before any normaliser; empty where only features are there.
        images: embeddings (N, D).
        texts: embeddings (M, D).
        pairs: rows (P, 2), a picture's and a text's, of all that belong together.
        failed: what could not be read, a sentence each; it is in no figure.
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
    normaliser: Callable[[str], str] | None = None,
    merge: bool = True,
    tick: Tick = lambda done, total: None,
) -> Measured:
    """Measure recall at 1, 5 and 10 on pairs, in both directions.

    Args:
        embedder: a loaded model.
        mix: sources of pairs, from ``open_mix``; every picture is embedded once, every text once.
        normaliser: applied to each text before it is embedded.
        merge: as for ``eval_set_of``; False counts texts as the official evaluation does.
        tick: called with the number of pictures and texts done, and of all, for a progress bar.

    Raises:
        DataError: no pair can be measured on.
    """
    return measure(embedder, eval_set_of(mix, merge=merge), normaliser=normaliser, tick=tick)


def measure(
    embedder: Embedder,
    found: EvalSet,
    *,
    normaliser: Callable[[str], str] | None = None,
    tick: Tick = lambda done, total: None,
) -> Measured:
    """Measure recall on pairs already read; as ``evaluate_retrieval``."""
    total, done = len(found.images) + len(found.texts), 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        tick(done, total)

    pictures = embed_pictures(embedder, found, tick=more)
    said = [normaliser(text) if normaliser else text for text in found.texts]
    texts = embedder.embed_texts(said)
    tick(total, total)
    return Measured(
        embedder.name,
        retrieval(pictures.vectors, texts, pictures.pairs),
        _unique([found.image_ids[n] for n in pictures.numbers.tolist()]),
        _unique(found.text_ids),
        found.texts,
        pictures.vectors,
        texts,
        pictures.pairs,
        list(found.skipped),
    )


def evaluate_features(
    images: StoredEmbeddings,
    texts: StoredEmbeddings,
    pairs: Iterable[tuple[str, str]],
    *,
    truth: str,
) -> Measured:
    """Measure recall of features already extracted, compared by dot product as they are.

    Args:
        images: from ``read_embeddings``.
        texts: likewise.
        pairs: an image id and a text id each, of all that belong together; an empty id asks for
            nothing.
        truth: where the pairs are from, for messages.

    Raises:
        DataError: an id of a pair has no features, or there is no pair.
        UsageError: the vectors are of different widths.
    """
    listed = list(dict.fromkeys(pair for pair in pairs if all(pair)))
    for stored, side, what in ((images, 0, "image"), (texts, 1, "text")):
        held = set(stored.ids)
        missing = dict.fromkeys(pair[side] for pair in listed if pair[side] not in held)
        if missing:
            raise DataError(
                f"{len(missing):,} of the {what} ids in {truth} are not in {stored.path}, "
                f"{next(iter(missing))!r} for one; embed the whole split"
            )
        norms = np.linalg.norm(stored.vectors, axis=1)
        if not np.allclose(norms, 1, atol=0.01):
            warnings.warn(
                f"{stored.path}: lengths of vectors are {norms.min():.3g} to {norms.max():.3g}, "
                "not 1; they are compared as they are",
                stacklevel=2,
            )
    rows = [{each: row for row, each in enumerate(stored.ids)} for stored in (images, texts)]
    numbers = np.array([(rows[0][i], rows[1][t]) for i, t in listed], np.int64).reshape(-1, 2)
    return Measured(
        str(images.path),
        retrieval(images.vectors, texts.vectors, numbers),
        [parse_id(each) for each in images.ids],
        [parse_id(each) for each in texts.ids],
        [],
        images.vectors,
        texts.vectors,
        numbers,
    )


def pairs_of(mix: Sequence[WeightedSource]) -> list[tuple[str, str]]:
    """Return the image id and the text id of every pair of sources; no picture is opened.

    Raises:
        DataError: a row cannot be used.
    """
    rows = (part.source.row(index) for part in mix for index in range(len(part.source)))
    return [(row.image_id, row.text_id) for row in rows if row.image_id and row.text_id]


def _unique(ids: list[str]) -> list[Id]:
    return [parse_id(each) for each in ids] if len(set(ids)) == len(ids) else list(range(len(ids)))

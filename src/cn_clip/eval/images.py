"""Embed the images of an evaluation set; unreadable ones are skipped and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cn_clip.data.sources.base import located
from cn_clip.embedder import Embedder
from cn_clip.errors import CNClipError, DataError
from cn_clip.eval.dataset import EvalSet
from cn_clip.translation import _


@dataclass(frozen=True, slots=True)
class EmbeddedImages:
    """The readable images of a set: their ``indexes`` (N,) in it, ``vectors`` (N, D), and
    ``pairs`` (P, 2) of a row of ``vectors`` and the index of a text."""

    indexes: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float32]
    pairs: npt.NDArray[np.int64]


def embed_eval_images(
    embedder: Embedder,
    dataset: EvalSet,
    *,
    tick: Callable[[int], None] = lambda _: None,
    on_content: Callable[[bytes], None] = lambda _: None,
) -> EmbeddedImages:
    """Embed the images; unreadable ones are added to ``dataset.skipped``.

    Args:
        embedder: a loaded model.
        dataset: the evaluation set.
        tick: called with the number of images just read.
        on_content: called with the bytes of each image, empty for one that cannot be read.

    Raises:
        DataError: no image of a pair is readable.
    """
    read_errors: dict[int, CNClipError] = {}  # more precise than the embedder's error

    def contents() -> Iterator[bytes]:
        for index in range(len(dataset.images)):
            tick(1)
            try:
                content = dataset.image_bytes(index)
            except CNClipError as error:
                read_errors[index] = error
                content = b""  # the embedder reports it as unreadable
            on_content(content)
            yield content

    vectors, errors = embedder.embed_readable(contents())
    for index, error in sorted(errors.items()):
        source, row = dataset.images[index]
        message = located(dataset.sources[source], row, read_errors.get(index, error))
        if message not in dataset.skipped:  # it is, if another model ran before
            dataset.skipped.append(message)
    indexes = np.setdiff1d(np.arange(len(dataset.images)), sorted(errors))
    pairs = dataset.pairs[np.isin(dataset.pairs[:, 0], indexes)]
    if not len(pairs):
        raise DataError(
            _(
                "none of the {image_count:,} images is readable; the first: {skipped}",
                image_count=len(dataset.images),
                skipped=dataset.skipped[0],
            )
        )
    pairs = np.stack([np.searchsorted(indexes, pairs[:, 0]), pairs[:, 1]], axis=1)
    return EmbeddedImages(indexes, vectors, pairs)

"""The pictures and texts of pairs to measure on, embedded; what cannot be read is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.data.pair import located
from cn_clip.embedder import Embedder
from cn_clip.errors import CNClipError, DataError, ImageError
from cn_clip.eval.pairs import EvalSet


@dataclass(frozen=True, slots=True)
class Readable:
    """The rows of an ``EvalSet`` that can be measured on.

    ``images`` and ``texts`` are their numbers in the set; ``pairs`` (P, 2) are places among them;
    ``vectors`` are the pictures' embeddings (N, D).
    """

    images: npt.NDArray[np.int64]
    texts: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float32]


def embed_pictures(
    embedder: Embedder, data: EvalSet, *, tick: Callable[[int], None] = lambda _: None
) -> Readable:
    """Embed the pictures. One that cannot be read is told in ``data.skipped``, and left out with
    the texts that have no other picture.

    Raises:
        DataError: no picture can be read.
    """
    errors: dict[int, ImageError] = {}

    def contents() -> Iterator[bytes]:
        for number in range(len(data.images)):
            tick(1)
            try:
                yield data.image_bytes(number)
            except CNClipError:
                yield b""  # no picture: refused as one by the embedder, and named

    vectors = embedder.embed_images(contents(), errors=errors)
    for number, error in sorted(errors.items()):
        source, index = data.images[number]
        told = located(data.sources[source], index, error)
        if told not in data.skipped:  # by a model before
            data.skipped.append(told)
    images = np.setdiff1d(np.arange(len(data.images)), sorted(errors))
    if not len(images):
        raise DataError("no picture of the data can be read; see: cn-clip data check")
    pairs = data.pairs[np.isin(data.pairs[:, 0], images)]
    texts = np.unique(pairs[:, 1])
    places = np.stack(
        [np.searchsorted(images, pairs[:, 0]), np.searchsorted(texts, pairs[:, 1])], axis=1
    )
    return Readable(images, texts, places, vectors)


def embed_texts(embedder: Embedder, data: EvalSet, readable: Readable) -> npt.NDArray[np.float32]:
    """Return the embeddings (M, D) of the texts that have a picture, in the order of their
    numbers."""
    rows: Any = embedder.embed_texts([data.texts[n] for n in readable.texts.tolist()])
    return np.asarray(rows, np.float32)

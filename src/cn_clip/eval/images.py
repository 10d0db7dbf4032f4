"""The pictures of pairs to measure on, embedded; what cannot be read is left out and told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cn_clip.data.sources.base import located
from cn_clip.embedder import Embedder
from cn_clip.errors import CNClipError, DataError
from cn_clip.eval.dataset import EvalSet


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures that can be read: their ``numbers`` (N,) in the set, their embeddings
    ``vectors`` (N, D), and ``pairs`` (P, 2) of a row of these and the number of a text."""

    numbers: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float32]
    pairs: npt.NDArray[np.int64]


def embed_pictures(
    embedder: Embedder,
    data: EvalSet,
    *,
    tick: Callable[[int], None] = lambda _: None,
    seen: Callable[[bytes], None] = lambda _: None,
) -> Pictures:
    """Embed the pictures; one that cannot be read is told in ``data.skipped``.

    Args:
        embedder: a loaded model.
        data: the pairs.
        tick: called with how many pictures more were read.
        seen: given the bytes of each picture, none for one that cannot be read.

    Raises:
        DataError: no picture of a pair can be read.
    """
    unread: dict[int, CNClipError] = {}  # what is told, where the embedder sees no picture at all

    def contents() -> Iterator[bytes]:
        for number in range(len(data.images)):
            tick(1)
            try:
                content = data.image_bytes(number)
            except CNClipError as error:
                unread[number] = error
                content = b""  # no picture: refused as one by the embedder
            seen(content)
            yield content

    vectors, errors = embedder.embed_readable(contents())
    for number, error in sorted(errors.items()):
        source, index = data.images[number]
        told = located(data.sources[source], index, unread.get(number, error))
        if told not in data.skipped:  # by a model before
            data.skipped.append(told)
    numbers = np.setdiff1d(np.arange(len(data.images)), sorted(errors))
    pairs = data.pairs[np.isin(data.pairs[:, 0], numbers)]
    if not len(pairs):
        raise DataError(
            f"none of the {len(data.images):,} pictures can be read; the first: {data.skipped[0]}"
        )
    pairs = np.stack([np.searchsorted(numbers, pairs[:, 0]), pairs[:, 1]], axis=1)
    return Pictures(numbers, vectors, pairs)

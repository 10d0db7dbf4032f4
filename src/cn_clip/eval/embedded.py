"""Pairs to measure on, embedded: what can be read, and a digest of what it was."""

from __future__ import annotations

import hashlib
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
class EmbeddedPairs:
    """Unit vectors of ``images`` (N, D) and ``texts`` (M, D), ``pairs`` (P, 2) of their rows, a
    ``digest`` of all pictures and texts, and what ``failed``, a sentence each."""

    images: npt.NDArray[Any]
    texts: npt.NDArray[Any]
    pairs: npt.NDArray[np.int64]
    digest: str
    failed: list[str]


def embed_pairs(
    embedder: Embedder, found: EvalSet, *, tick: Callable[[int, int], None] = lambda *_: None
) -> EmbeddedPairs:
    """Embed every picture and every text; a picture that cannot be read is left out and told.

    Args:
        embedder: a loaded model.
        found: the pairs.
        tick: called with how many pictures were read, and how many there are.

    Raises:
        DataError: no picture can be read.
    """
    digest = hashlib.sha256("\n".join(found.texts).encode("utf-8", "replace"))
    unread: dict[int, str] = {}

    def contents() -> Iterator[bytes]:
        for number in range(len(found.images)):
            try:
                content = found.image_bytes(number)
            except CNClipError as error:
                unread[number] = str(error)
                content = b""  # no picture: refused as one by the embedder
            digest.update(hashlib.sha256(content).digest())
            tick(number + 1, len(found.images))
            yield content

    errors: dict[int, ImageError] = {}
    images = embedder.embed_images(contents(), errors=errors)
    failed = list(found.skipped)
    for number, error in errors.items():
        source, index = found.images[number]
        reason = unread.get(number)
        failed.append(reason or located(found.sources[source], index, error))
    rows = np.full(len(found.images), -1)
    rows[[n for n in range(len(rows)) if n not in errors]] = np.arange(len(images))
    pairs = np.stack([rows[found.pairs[:, 0]], found.pairs[:, 1]], axis=1)
    pairs = pairs[pairs[:, 0] >= 0]
    if not len(pairs):
        raise DataError(f"none of the {len(rows):,} pictures can be read; the first: {failed[0]}")
    digest.update(np.ascontiguousarray(found.pairs).tobytes())
    texts = embedder.embed_texts(found.texts)
    return EmbeddedPairs(images, texts, pairs, digest.hexdigest()[:32], failed)

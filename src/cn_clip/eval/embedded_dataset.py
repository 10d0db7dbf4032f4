"""Pairs to measure on, embedded: what can be read, and a digest of what it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.embedder import Embedder
from cn_clip.eval.dataset import EvalSet
from cn_clip.eval.images import embed_pictures


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
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        tick(done, len(found.images))

    pictures = embed_pictures(
        embedder,
        found,
        tick=more,
        seen=lambda content: digest.update(hashlib.sha256(content).digest()),
    )
    digest.update(np.ascontiguousarray(found.pairs).tobytes())
    texts = embedder.embed_texts(found.texts)
    return EmbeddedPairs(
        pictures.vectors, texts, pictures.pairs, digest.hexdigest()[:32], list(found.skipped)
    )

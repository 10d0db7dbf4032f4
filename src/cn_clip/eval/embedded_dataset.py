"""Embed an evaluation set and fingerprint its data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.embedder import Embedder
from cn_clip.eval.dataset import EvalSet
from cn_clip.eval.images import embed_eval_images


@dataclass(frozen=True, slots=True)
class EmbeddedPairs:
    """Unit vectors of ``images`` (N, D) and ``texts`` (M, D), ``pairs`` (P, 2) of their rows, a
    ``digest`` of all images and texts, and one message per unreadable row in ``failed``."""

    images: npt.NDArray[Any]
    texts: npt.NDArray[Any]
    pairs: npt.NDArray[np.int64]
    digest: str
    failed: list[str]


def embed_pairs(
    embedder: Embedder, dataset: EvalSet, *, tick: Callable[[int, int], None] = lambda *_: None
) -> EmbeddedPairs:
    """Embed all images and texts; unreadable images are skipped and reported.

    Args:
        embedder: a loaded model.
        dataset: the evaluation set.
        tick: called with the number of images read so far, and of all images.

    Raises:
        DataError: no image is readable.
    """
    digest = hashlib.sha256("\n".join(dataset.texts).encode("utf-8", "replace"))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        tick(done, len(dataset.images))

    images = embed_eval_images(
        embedder,
        dataset,
        tick=advance,
        on_content=lambda content: digest.update(hashlib.sha256(content).digest()),
    )
    digest.update(np.ascontiguousarray(dataset.pairs).tobytes())
    texts = embedder.embed_texts(dataset.texts)
    return EmbeddedPairs(
        images.vectors, texts, images.pairs, digest.hexdigest()[:32], list(dataset.skipped)
    )

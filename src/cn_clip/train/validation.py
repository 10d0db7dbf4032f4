"""The score of a run: true recall on the validation pairs, both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch

from cn_clip import distributed
from cn_clip.data.captions import digest, plain
from cn_clip.data.sources.base import located
from cn_clip.data.sources.open import WeightedSource
from cn_clip.embedder import Embedder
from cn_clip.errors import CNClipError
from cn_clip.eval.dataset import EvalSet
from cn_clip.eval.metrics.recall import Retrieval, retrieval
from cn_clip.model.clip import CLIP

_COMPARED_ROWS = 2_000_000  # of training, with validation's
_COMPARED_PICTURES = 10_000

Vectors = npt.NDArray[np.float32]


def embed(
    model: CLIP,
    validation: EvalSet,
    *,
    autocast: torch.dtype | None,
    images: Vectors | None = None,
    divided: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Vectors, Vectors]:
    """Return the embeddings of all pictures (N, D) and all texts (M, D), on every process.

    Each process embeds its share; or all of them everything, if not ``divided``: a model whose
    weights are in shares must run as often on each. A picture that cannot be read has zeros.
    ``images`` from an earlier call are returned as they are, if the image tower has not changed.
    ``tick`` is called before each picture is read, and before the texts; what it raises ends this.
    """
    embedder = Embedder.from_model(model)
    device = model.text_projection.device.type
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        if images is None:
            mine = _my_share(len(validation.images), divided)
            said: list[str] = []
            rows, errors = embedder.embed_readable(_bytes(validation, mine, tick))
            whole = np.zeros((len(mine), rows.shape[1]), np.float32)
            whole[[n for n in range(len(mine)) if n not in errors]] = rows
            for n, error in errors.items():
                source, index = validation.images[mine[n]]
                said.append(located(validation.sources[source], index, error))
            images = _joined(whole, divided)
            for each in (one for many in distributed.all_gather_object(said) for one in many):
                if each not in validation.skipped:  # at an evaluation before
                    validation.skipped.append(each)
        tick()
        mine = _my_share(len(validation.texts), divided)
        texts = _joined(embedder.embed_texts([validation.texts[n] for n in mine]), divided)
    return images, texts


def score(images: Vectors, texts: Vectors, validation: EvalSet) -> Retrieval:
    """Measure recall in both directions, without the pictures that cannot be read."""
    there = np.asarray(images.any(axis=1))
    pairs = validation.pairs[there[validation.pairs[:, 0]]]
    numbers = np.cumsum(there) - 1
    return retrieval(images[there], texts, np.stack([numbers[pairs[:, 0]], pairs[:, 1]], axis=1))


def shared_pairs(validation: EvalSet, training: Sequence[WeightedSource]) -> list[str]:
    """Say which validation pairs are in the training data: the same caption with a picture of the
    same id or the same bytes. At most the first two million training rows are compared."""
    wanted: dict[int, list[int]] = {}
    for image, text in validation.pairs.tolist():
        caption = validation.texts[text]
        wanted.setdefault(digest(plain(caption) or caption), []).append(image)
    found, compared, pictures = [], 0, 0
    for part in training:
        for index in range(min(len(part.source), _COMPARED_ROWS - compared)):
            try:
                row = part.source.row(index)
                candidates = wanted.get(digest(plain(row.text) or row.text), ())
                if not candidates or pictures >= _COMPARED_PICTURES:
                    continue
                content = part.source.image(index)
            except CNClipError:
                continue
            pictures += 1
            for image in candidates:
                source, at = validation.images[image]
                held = validation.sources[source]
                with suppress(CNClipError):  # that it cannot be read is told elsewhere
                    if held.row(at).image_id != row.image_id and held.image(at) != content:
                        continue
                    found.append(f"{held.where(at)} is also {part.source.where(index)}")
        compared += len(part.source)
    return found


def _bytes(
    validation: EvalSet, numbers: Sequence[int], tick: Callable[[], None]
) -> Iterator[bytes]:
    for number in numbers:
        tick()
        try:
            yield validation.image_bytes(number)
        except CNClipError:
            yield b""  # no picture: refused as one by the embedder, and named


def _my_share(count: int, divided: bool) -> range:
    world, rank = (distributed.world_size(), distributed.rank()) if divided else (1, 0)
    return range(count * rank // world, count * (rank + 1) // world)


def _joined(mine: Vectors, divided: bool) -> Vectors:
    return np.concatenate(distributed.all_gather_object(mine)) if divided else mine

"""The score of a run: recall on the validation pairs, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cn_clip import distributed
from cn_clip.backends import Features, Pixels
from cn_clip.backends.torch import TorchBackend
from cn_clip.data.sources.base import Row, Source, located
from cn_clip.data.sources.open import WeightedSource, parts_of
from cn_clip.data.sources.row_index import index_of
from cn_clip.data.sources.row_keys import caption_key
from cn_clip.embedder import Embedder
from cn_clip.errors import CNClipError
from cn_clip.eval.dataset import EvalSet
from cn_clip.eval.metrics.recall import Retrieval, retrieval
from cn_clip.model.clip import CLIP
from cn_clip.processes import usable_cpus
from cn_clip.train.loss import clip_loss
from cn_clip.translation import _

_COMPARED_ROWS = 2_000_000  # training rows, of sources without index, that are compared
_COMPARED_IMAGES = 10_000

Vectors = npt.NDArray[np.float32]
Between = Callable[[bool], bool]
"""Given whether this process has more batches, returns whether any process has. All processes call
it equally often, so it may communicate."""


def embed(
    model: CLIP,
    validation: EvalSet,
    *,
    autocast: torch.dtype | None,
    images: Vectors | None = None,
    divided: bool = True,
    between: Between = lambda working: False,
) -> tuple[Vectors, Vectors]:
    """Return the embeddings of all images (N, D) and all texts (M, D), on every process.

    An unreadable image has a row of zeros, and ``validation.skipped`` names it.

    Args:
        model: the model, in evaluation mode.
        validation: the validation pairs.
        autocast: dtype of the towers, None for float32.
        images: image embeddings of an earlier call, returned as they are; for an image tower that
            has not changed.
        divided: each process embeds a part. If not, each embeds everything: sharded models must
            run equally often on all processes.
        between: called before each batch of a tower, and with one process before each image is
            read; may raise to stop.
    """
    embedder = Embedder.from_model(model)
    embedder.backend = _InterruptibleBackend(model, between)
    device = model.text_projection.device.type
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        if images is None:
            part = _process_part(len(validation.images), divided)
            messages: list[str] = []
            rows, errors = embedder.embed_readable(_bytes(validation, part, between))
            _wait_for_others(between)
            own = np.zeros((len(part), rows.shape[1]), np.float32)
            own[[n for n in range(len(part)) if n not in errors]] = rows
            for n, error in errors.items():
                source, index = validation.images[part[n]]
                messages.append(located(validation.sources[source], index, error))
            images = _gather(own, divided)
            for of_process in distributed.all_gather_object(messages):
                for message in of_process:
                    if message not in validation.skipped:  # from an earlier evaluation
                        validation.skipped.append(message)
        part = _process_part(len(validation.texts), divided)
        own = embedder.embed_texts([validation.texts[n] for n in part])
        _wait_for_others(between)
        texts = _gather(own, divided)
    return images, texts


def contrastive_loss(
    images: Vectors, texts: Vectors, validation: EvalSet, logit_scale: Tensor
) -> float:
    """Return the contrastive loss of all pairs as one batch, without unreadable images.

    Args:
        images, texts, validation: as for ``score``.
        logit_scale: factor on cosines, on the device to compute on.
    """
    pairs = _readable_pairs(images, validation)
    pairs = pairs[_process_part(len(pairs), divided=True)]
    image, text, keys = (
        torch.from_numpy(rows).to(logit_scale.device)
        for rows in (images[pairs[:, 0]], texts[pairs[:, 1]], pairs)
    )
    with torch.no_grad():
        return float(clip_loss(image, text, logit_scale, keys=keys))


def score(images: Vectors, texts: Vectors, validation: EvalSet) -> Retrieval:
    """Measure recall in both directions, without unreadable images."""
    readable = np.asarray(images.any(axis=1))
    pairs = _readable_pairs(images, validation)
    new_index = np.cumsum(readable) - 1
    pairs = np.stack([new_index[pairs[:, 0]], pairs[:, 1]], axis=1)
    return retrieval(images[readable], texts, pairs)


def _readable_pairs(images: Vectors, validation: EvalSet) -> npt.NDArray[np.int64]:
    readable = np.asarray(images.any(axis=1))
    pairs: npt.NDArray[np.int64] = validation.pairs[readable[validation.pairs[:, 0]]]
    return pairs


def shared_pairs(validation: EvalSet, training: Sequence[WeightedSource]) -> list[str]:
    """Return a line for each validation pair that is in the training data too: the same caption,
    and an image with the same id or the same bytes.

    Captions are compared in the indexes of the sources. Of sources without an index, at most
    ``_COMPARED_ROWS`` rows are read, and at most ``_COMPARED_IMAGES`` images in all.
    """
    images_of: dict[int, list[int]] = {}  # validation images by the digest of a caption
    for image, text in validation.pairs.tolist():
        caption = validation.texts[text]
        images_of.setdefault(caption_key(caption), []).append(image)
    captions = _KeySet(np.fromiter(images_of, np.uint64, len(images_of)))
    lines: list[str] = []
    compared, opened = 0, 0
    for part in training:
        first = 0
        for source in parts_of(part.source):
            indexes: Iterable[int]
            if (own := index_of(source, workers=usable_cpus())) is not None:
                indexes = (first + captions.positions_in(own.captions())).tolist()
            else:
                indexes = range(first, first + min(len(source), max(0, _COMPARED_ROWS - compared)))
                compared += len(source)
            first += len(source)
            for index in indexes:
                if opened >= _COMPARED_IMAGES:
                    return lines
                try:
                    row = part.source.row(index)
                    candidates = images_of.get(caption_key(row.text), ())
                    if not candidates:
                        continue
                    content = part.source.image(index)
                except CNClipError:
                    continue
                opened += 1
                lines += _equal_pairs(validation, candidates, part.source, index, row, content)
    return lines


def _equal_pairs(
    validation: EvalSet,
    candidates: Sequence[int],
    training: Source,
    index: int,
    row: Row,
    content: bytes,
) -> list[str]:
    """Return a line for each of some validation images that is the image of a training pair."""
    lines = []
    for image in candidates:
        number, at = validation.images[image]
        source = validation.sources[number]
        with suppress(CNClipError):  # unreadable images are reported by ``embed``
            if source.row(at).image_id != row.image_id and source.image(at) != content:
                continue
            lines.append(
                _(
                    "{where} is also {training_where}",
                    where=source.where(at),
                    training_where=training.where(index),
                )
            )
    return lines


class _KeySet:
    """A few keys that are looked for among many."""

    def __init__(self, keys: npt.NDArray[np.uint64]) -> None:
        self._keys = np.sort(keys)
        self._low = np.zeros(1 << 16, dtype=bool)  # whether a key has these low bits
        self._low[_low_bits(keys)] = True

    def positions_in(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Return the positions of the keys (N,) that are in the set."""
        if not len(self._keys):
            return np.empty(0, np.int64)
        # First by 16 bits, which is many times faster and leaves few.
        likely = np.flatnonzero(self._low[_low_bits(keys)])
        at = np.searchsorted(self._keys, keys[likely])
        nearest = self._keys[np.minimum(at, len(self._keys) - 1)]
        equal: npt.NDArray[np.bool_] = nearest == keys[likely]
        return likely[equal]


def _low_bits(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint16]:
    return keys.astype(np.uint16)  # the conversion keeps the low bits


class _InterruptibleBackend(TorchBackend):
    def __init__(self, model: CLIP, between: Between) -> None:
        super().__init__(model)
        self._between = between

    def run_images(self, pixels: Pixels) -> Features:
        self._between(True)
        return super().run_images(pixels)

    def run_texts(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_]) -> Features:
        self._between(True)
        return super().run_texts(ids, mask)


def _wait_for_others(between: Between) -> None:
    """Call ``between`` until all processes are done, as they may have more batches."""
    while between(False):
        pass


def _bytes(validation: EvalSet, indexes: Sequence[int], between: Between) -> Iterator[bytes]:
    for index in indexes:
        if distributed.world_size() == 1:  # several agree once per batch
            between(True)
        try:
            yield validation.image_bytes(index)
        except CNClipError:
            yield b""  # not an image: the embedder reports it


def _process_part(count: int, divided: bool) -> range:
    world, rank = (distributed.world_size(), distributed.rank()) if divided else (1, 0)
    return range(count * rank // world, count * (rank + 1) // world)


def _gather(own: Vectors, divided: bool) -> Vectors:
    return np.concatenate(distributed.all_gather_object(own)) if divided else own

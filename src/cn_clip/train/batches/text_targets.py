"""Texts that a sentence encoder has embedded: what holds a text tower to what words mean.

Pairs are few next to words. A text tower that only sees the captions of its pairs forgets, or never
learns, all others; a batch of other texts in every step, each drawn to where a sentence encoder put
it, keeps their places (distillation into another modality's space: Reimers & Gurevych, 2020,
arXiv:2004.09813).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cn_clip import distributed
from cn_clip.data.loading.loader import token_ids
from cn_clip.embeddings.files import read_captions
from cn_clip.errors import UsageError

_SORTED_TOGETHER = 32  # batches whose texts are sorted by length, since padding costs time


@dataclass(frozen=True, slots=True)
class Sentences:
    """A process's share of a batch: ids int64 (S, L), and where each belongs, float32 (S, D)."""

    ids: Tensor
    places: Tensor


class SentenceBatches:
    """Batches of texts of like length; which texts a step has depends on seed and step alone."""

    def __init__(
        self, path: str, size: int, *, dim: int, context_length: int, stage: str, seed: int
    ) -> None:
        """Read texts and embeddings.

        Raises:
            UsageError: there are none, they are not ``dim`` wide, or fewer than a batch.
            DataError: they are damaged.
        """
        option = f"stages.{stage}.loss.sentences"
        stored = read_captions(Path(path).expanduser())
        if stored.vectors.shape[1] != dim:
            raise UsageError(
                f"{option}: the embeddings in {path} have {stored.vectors.shape[1]} numbers each, "
                f"and the model's {dim}; embed with an encoder as wide, or project them first"
            )
        world = distributed.world_size()
        if len(stored.ids) < size or size < world:
            raise UsageError(
                f"{option}_batch_size is {size}, with {len(stored.ids):,} texts in {path} and "
                f"{world} processes; give {world} to {len(stored.ids):,}"
            )
        self._texts = stored.ids
        self._places = F.normalize(torch.from_numpy(stored.vectors), dim=-1)
        self._lengths = np.array([len(text) for text in stored.ids])
        self._size, self._context_length, self._seed = size, context_length, seed
        self._drawn: tuple[int, list[npt.NDArray[np.int64]]] = (-1, [])

    def __len__(self) -> int:
        """Return how many texts there are."""
        return len(self._texts)

    def at(self, step: int) -> Sentences:
        """Return this process's texts of a step, counted from 0."""
        epoch, number = divmod(step, len(self._texts) // self._size)
        if self._drawn[0] != epoch:
            self._drawn = epoch, self._batches(epoch)
        rows = self._drawn[1][number][distributed.rank() :: distributed.world_size()]
        ids = token_ids([self._texts[row] for row in rows], self._context_length)
        return Sentences(ids, self._places[rows])

    def _batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self._texts))[: len(self._texts) // self._size * self._size]
        found: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(order), self._size * _SORTED_TOGETHER):
            some = order[start : start + self._size * _SORTED_TOGETHER]
            some = some[np.argsort(self._lengths[some], kind="stable")]
            found += np.split(some, len(some) // self._size)
        return [found[n] for n in rng.permutation(len(found))]

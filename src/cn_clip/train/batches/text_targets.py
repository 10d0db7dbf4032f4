"""Text distillation towards a sentence encoder's embeddings (Reimers & Gurevych, 2020,
arXiv:2004.09813).

The captions of the pairs contain few words. A text tower trained on them alone forgets all others,
or never learns them. So each step also pulls a batch of other texts towards their embeddings by a
sentence encoder.
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
from cn_clip.translation import _

_SORTED_BATCHES = 32  # batches whose texts are sorted by length together, to save padding


@dataclass(frozen=True, slots=True)
class TextTargetBatch:
    """This process's texts of a step, and their target embeddings.

    Attributes:
        ids: int64 (S, L).
        targets: float32 (S, D), of unit length.
    """

    ids: Tensor
    targets: Tensor


class TextTargets:
    """Batches of texts of similar length with target embeddings.

    The texts of a step depend on the seed and the step alone.
    """

    def __init__(
        self, path: str, size: int, *, dim: int, context_length: int, stage: str, seed: int
    ) -> None:
        """Read texts and embeddings; ``size`` is the global batch size.

        Raises:
            UsageError: the folder is missing, the embeddings are not ``dim`` wide, or there are
                fewer texts than a batch has.
            DataError: a file is damaged.
        """
        option = f"stages.{stage}.loss.text_targets"
        stored = read_captions(Path(path).expanduser())
        if stored.vectors.shape[1] != dim:
            raise UsageError(
                _(
                    "{option}: the embeddings in {path} have width {vector_width}, the model's "
                    "{dim}; use an encoder of that width, or project them first",
                    option=option,
                    path=path,
                    vector_width=stored.vectors.shape[1],
                    dim=dim,
                )
            )
        world = distributed.world_size()
        if len(stored.ids) < size or size < world:
            raise UsageError(
                _(
                    "{option}_batch_size is {size}, with {id_count:,} texts in {path} and {world} "
                    "processes; give {world} to {id_count:,}",
                    option=option,
                    size=size,
                    id_count=len(stored.ids),
                    path=path,
                    world=world,
                )
            )
        self._texts = stored.ids
        self._targets = F.normalize(torch.from_numpy(stored.vectors), dim=-1)
        self._lengths = np.array([len(text) for text in stored.ids])
        self._size, self._context_length, self._seed = size, context_length, seed
        self._epoch_batches: tuple[int, list[npt.NDArray[np.int64]]] = (-1, [])

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._texts)

    def at(self, step: int) -> TextTargetBatch:
        """Return this process's texts of a step (from 0)."""
        epoch, n = divmod(step, len(self._texts) // self._size)
        if self._epoch_batches[0] != epoch:
            self._epoch_batches = epoch, self._batches(epoch)
        rows = self._epoch_batches[1][n][distributed.rank() :: distributed.world_size()]
        ids = token_ids([self._texts[row] for row in rows], self._context_length)
        return TextTargetBatch(ids, self._targets[rows])

    def _batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self._texts))[: len(self._texts) // self._size * self._size]
        batches: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(order), self._size * _SORTED_BATCHES):
            group = order[start : start + self._size * _SORTED_BATCHES]
            group = group[np.argsort(self._lengths[group], kind="stable")]
            batches += np.split(group, len(group) // self._size)
        return [batches[n] for n in rng.permutation(len(batches))]

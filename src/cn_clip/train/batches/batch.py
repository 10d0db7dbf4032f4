"""Local batches: one process's part of each global batch, with pixels or cached features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cn_clip.data.loading.loader import Loader, PlannedLoader, keys_of, stack_keys, token_ids
from cn_clip.data.loading.sampler import BatchPart, batches
from cn_clip.data.sources.base import Row, located
from cn_clip.data.sources.open import WeightedSource
from cn_clip.errors import CNClipError, DataError
from cn_clip.train.batches.feature_cache import ImageFeatures
from cn_clip.translation import _


@dataclass(slots=True)
class LocalBatch:
    """One process's part of a global batch.

    Attributes:
        pixels: uint8 (B, 3, S, S), or None with ``features``.
        features: float32 (B, D) of the image tower, or None.
        ids: int64 token ids (B, L).
        rows: texts and ids of the B pairs.
        keys: int64 (B, 3); pairs that agree in any column are not negatives of each other.
    """

    pixels: Tensor | None
    features: Tensor | None
    ids: Tensor
    rows: list[Row]
    keys: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def local_batches(
    loader: Loader | CachedLoader, epoch: int, start: int = 0
) -> Iterator[LocalBatch]:
    """Yield the local batches of an epoch, from index ``start`` on."""
    if isinstance(loader, CachedLoader):
        yield from loader.local_batches(epoch, start)
        return
    for batch in loader.batches(epoch, start):
        yield LocalBatch(batch.pixels, None, batch.ids, batch.rows, batch.keys)


class CachedLoader(PlannedLoader):
    """Yields batches with cached image features."""

    def __init__(
        self,
        mix: Sequence[WeightedSource],
        cached: ImageFeatures,
        global_batch_size: int,
        *,
        context_length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_skipped_fraction: float = 0.1,
    ) -> None:
        super().__init__(
            mix,
            global_batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            max_skipped_fraction=max_skipped_fraction,
        )
        self._cached, self._context_length = cached, context_length

    def mean_image(self) -> Tensor:
        """Return the mean (D,) of the unit-length image embeddings of all processes' pairs."""
        total, count = torch.zeros(()), 0
        for part in batches(self.plan, 0, self._size):
            features = self._cached.features(part)
            features = features[~features[:, 0].isnan()]
            total, count = total + F.normalize(features, dim=-1).sum(0), count + len(features)
        return total / max(1, count)

    def local_batches(self, epoch: int, start: int = 0) -> Iterator[LocalBatch]:
        """Yield the local batches of an epoch, from index ``start`` on.

        Raises:
            DataError: more than ``max_skipped_fraction`` of the pairs cannot be read.
        """
        for part in self.parts(epoch, start):
            yield self._local_batch(part)

    def _local_batch(self, part: BatchPart) -> LocalBatch:
        rows, keys, kept, skipped = [], [], [], []
        features = self._cached.features(part)
        readable = ~features[:, 0].isnan()
        for at, (number, index) in enumerate(
            zip(part.sources.tolist(), part.indexes.tolist(), strict=True)
        ):
            source = self.sources[number]
            try:
                row = source.row(index)
                if not row.text.strip():
                    raise DataError(_("its text is empty"))
                if not readable[at]:
                    raise DataError(_("its image was unreadable when its features were computed"))
            except CNClipError as error:
                skipped.append(located(source, index, error))
                continue
            rows.append(row)
            keys.append(keys_of(row, source, number, index))
            kept.append(at)
        self.count(len(part.indexes), skipped)
        ids = token_ids([row.text for row in rows], self._context_length)
        return LocalBatch(None, features[kept], ids, rows, stack_keys(keys))

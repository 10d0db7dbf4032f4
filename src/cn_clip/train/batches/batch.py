"""Local batches: one process's part of each global batch, with pixels or cached features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cn_clip.data.loading.loader import (
    MAX_LISTED,
    Loader,
    check_skipped,
    keys_of,
    stack_keys,
    token_ids,
)
from cn_clip.data.loading.sampler import BatchPart, batch_count, batches, plan_of
from cn_clip.data.sources.base import Row, located
from cn_clip.data.sources.open import WeightedSource
from cn_clip.errors import CNClipError, DataError
from cn_clip.train.batches.feature_cache import ImageFeatures


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


class CachedLoader:
    """Yields batches with cached image features; see ``cn_clip.data.loading.loader.Loader``."""

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
        self.plan = plan_of(mix, seed)
        self.seen, self.skipped = 0, 0
        self.reasons: list[str] = []
        self._mix, self._cached, self._context_length = mix, cached, context_length
        self._size, self._rank, self._world_size = global_batch_size, rank, world_size
        self._max_skipped_fraction = max_skipped_fraction

    def __len__(self) -> int:
        return batch_count(self.plan, self._size, self._world_size)

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
        parts = batches(
            self.plan,
            epoch,
            self._size,
            rank=self._rank,
            world_size=self._world_size,
            start=start,
        )
        for part in parts:
            yield self._local_batch(part)

    def _local_batch(self, part: BatchPart) -> LocalBatch:
        rows, keys, kept = [], [], []
        features = self._cached.features(part)
        readable = ~features[:, 0].isnan()
        for at, (number, index) in enumerate(
            zip(part.sources.tolist(), part.indexes.tolist(), strict=True)
        ):
            source = self._mix[number].source
            try:
                row = source.row(index)
                if not row.text.strip():
                    raise DataError("its text is empty")
                if not readable[at]:
                    raise DataError("its image was unreadable when its features were computed")
            except CNClipError as error:
                self.skipped += 1
                if len(self.reasons) < MAX_LISTED:
                    self.reasons.append(located(source, index, error))
                continue
            rows.append(row)
            keys.append(keys_of(row, source, number, index))
            kept.append(at)
        self.seen += len(part.indexes)
        check_skipped(self, len(self.plan) // self._world_size, self._max_skipped_fraction)
        ids = token_ids([row.text for row in rows], self._context_length)
        return LocalBatch(None, features[kept], ids, rows, stack_keys(keys))

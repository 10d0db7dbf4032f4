"""What a step takes: a process's share of a batch, with pictures or with their cached features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
class Share:
    """One process's share of a batch.

    Attributes:
        pixels: uint8 (B, 3, S, S), or None where ``features`` stand for them.
        features: float32 (B, D) of the image tower, or None.
        ids: int64 (B, L).
        rows: texts and ids of the B pairs.
        keys: int64 (B, 3): pairs that agree in any of them are no negatives of each other.
    """

    pixels: Tensor | None
    features: Tensor | None
    ids: Tensor
    rows: list[Row]
    keys: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def shares(loader: Loader | CachedLoader, epoch: int, start: int = 0) -> Iterator[Share]:
    """Yield this process's shares of an epoch's batches, from number ``start`` on."""
    if isinstance(loader, CachedLoader):
        yield from loader.shares(epoch, start)
        return
    for batch in loader.batches(epoch, start):
        yield Share(batch.pixels, None, batch.ids, batch.rows, batch.keys)


class CachedLoader:
    """Yields the batches of an epoch without opening a picture; see ``cn_clip.data.Loader``."""

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
        most_skipped: float = 0.1,
    ) -> None:
        self.plan = plan_of(mix, seed)
        self.seen, self.skipped = 0, 0
        self.reasons: list[str] = []
        self._mix, self._cached, self._context_length = mix, cached, context_length
        self._size, self._rank, self._world_size = global_batch_size, rank, world_size
        self._most_skipped = most_skipped

    def __len__(self) -> int:
        return batch_count(self.plan, self._size, self._world_size)

    def shares(self, epoch: int, start: int = 0) -> Iterator[Share]:
        """Yield this process's shares of an epoch's batches, from number ``start`` on."""
        parts = batches(
            self.plan,
            epoch,
            self._size,
            rank=self._rank,
            world_size=self._world_size,
            start=start,
        )
        for part in parts:
            yield self._share(part)

    def _share(self, part: BatchPart) -> Share:
        rows, keys, kept = [], [], []
        features = self._cached.features(part)
        readable = ~features[:, 0].isnan()
        for place, (number, index) in enumerate(
            zip(part.sources.tolist(), part.indexes.tolist(), strict=True)
        ):
            source = self._mix[number].source
            try:
                row = source.row(index)
                if not row.text.strip():
                    raise DataError("its text is empty")
                if not readable[place]:
                    raise DataError("its picture could not be read when features were computed")
            except CNClipError as error:
                self.skipped += 1
                if len(self.reasons) < MAX_LISTED:
                    self.reasons.append(located(source, index, error))
                continue
            rows.append(row)
            keys.append(keys_of(row, source, number, index))
            kept.append(place)
        self.seen += len(part.indexes)
        check_skipped(self, len(self.plan) // self._world_size, self._most_skipped)
        ids = token_ids([row.text for row in rows], self._context_length)
        return Share(None, features[kept], ids, rows, stack_keys(keys))

"""Pairs whose image and text do not belong together, found by the cosine of their embeddings.

LAION-400M was made of web pairs in this way (Schuhmann et al., arXiv:2111.02114, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.data.process_map import Progress, Workers, at_most, no_progress, parallel_map
from cn_clip.errors import UsageError
from cn_clip.search.kernels import float32_of
from cn_clip.shards.folder import Rows, ShardFolder, mapped_vectors
from cn_clip.shards.kept import Mask, mask_of, write_kept
from cn_clip.shards.metadata import check_rows
from cn_clip.text import path_text
from cn_clip.translation import _

Cosines = npt.NDArray[np.float32]

_BLOCK = 1 << 14
_BINS = 4000  # of the distribution of cosines: to 0.0005
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, slots=True)
class Filtered:
    """What a filter kept.

    Attributes:
        pairs: of all shards, or of the list that the filter was given.
        kept: of them.
        min_cosine: the lowest cosine that is kept.
        quantiles: share -> the cosine that so many pairs do not reach.
    """

    pairs: int
    kept: int
    min_cosine: float
    quantiles: dict[float, float]


def filter_pairs(
    folder: ShardFolder,
    out: Path,
    *,
    min_cosine: float | None = None,
    share: float | None = None,
    within: Rows | None = None,
    workers: Workers = 0,
    on_progress: Progress = no_progress,
) -> Filtered:
    """Write the list of the pairs whose cosine is high enough.

    The cosines are read twice if a share is given: to find its limit, and to apply it. Memory: one
    shard for each worker.

    Args:
        folder: with ``text_emb`` beside ``img_emb``.
        out: from ``claim_kept``.
        min_cosine: the limit.
        share: of the pairs with the highest cosines, instead of a limit.
        within: ids (N,), sorted, of the pairs that are considered; None for all.
        workers: that read; 0 reads in this process.
        on_progress: called with the number of pairs so far and in total.

    Raises:
        UsageError: there are no text embeddings; or not one of the limits is given.
        DataError: a shard is damaged.
        CNClipError: the disk is full.
    """
    if (min_cosine is None) == (share is None):
        raise UsageError(_("give one of --min-cosine and --share"))
    rows = [len(folder.vectors(shard)) for shard in folder.numbers]
    total, done = sum(rows), 0
    counts = np.zeros(_BINS, np.int64)
    limit = min_cosine
    with parallel_map(PairCosines(folder), at_most(workers, len(rows))) as run:

        def considered() -> Iterator[tuple[int, Cosines, Mask]]:
            for shard, cosines in zip(folder.numbers, run(folder.numbers), strict=True):
                yield shard, cosines, mask_of(shard, len(cosines), within)

        if share is not None:
            for _shard, cosines, mask in considered():
                counts += _histogram(cosines[mask])
            limit = _quantile(counts, 1 - share)
            counts[:] = 0
        assert limit is not None
        bound = np.float32(limit)

        def masks() -> Iterator[tuple[int, Mask]]:
            nonlocal counts
            for shard, cosines, mask in considered():
                counts += _histogram(cosines[mask])
                yield shard, mask & (cosines >= bound)

        def tick(count: int) -> None:
            nonlocal done
            done += count
            on_progress(done, total)

        kept = write_kept(folder, out, masks(), tick=tick)
    quantiles = {each: round(_quantile(counts, each), 4) for each in QUANTILES}
    return Filtered(int(counts.sum()), kept, float(limit), quantiles)


@dataclass(frozen=True, slots=True)
class PairCosines:
    """Computes the cosines of the pairs of a shard, in any process."""

    folder: ShardFolder

    def __call__(self, shard: int) -> Cosines:
        """Return the cosine (N,) of each pair; -1 where a vector has no direction.

        Raises:
            UsageError: the shard has no text embeddings.
            DataError: it is damaged.
        """
        path = self.folder.text_path(shard)
        if not path.exists():
            raise UsageError(
                _(
                    "{path} is missing: the shards hold no text embeddings; embed images and "
                    "texts: cn-clip bulk plan --embed both",
                    path=path_text(path),
                )
            )
        images, texts = self.folder.vectors(shard), mapped_vectors(path, self.folder.dim)
        check_rows(self.folder, shard, len(images) == len(texts))
        return pair_cosines(images.view(np.ndarray), texts.view(np.ndarray))


def pair_cosines(images: npt.NDArray[Any], texts: npt.NDArray[Any]) -> Cosines:
    """Return the cosines (N,) of rows (N, D); -1 where one is zero or not finite."""
    cosines = np.empty(len(images), np.float32)
    for at in range(0, len(images), _BLOCK):
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            a, b = (float32_of(rows[at : at + _BLOCK]) for rows in (images, texts))
            products = (a * b).sum(axis=1)
            products /= np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        for stored in (images[at : at + _BLOCK], texts[at : at + _BLOCK]):
            products[~np.isfinite(stored).all(axis=1)] = -1
        products[~np.isfinite(products)] = -1
        cosines[at : at + _BLOCK] = products
    return cosines


def _histogram(cosines: Cosines) -> npt.NDArray[np.int64]:
    bins = np.clip(((cosines.astype(np.float64) + 1) / 2 * _BINS).astype(np.int64), 0, _BINS - 1)
    return np.bincount(bins, minlength=_BINS)


def _quantile(counts: npt.NDArray[np.int64], share: float) -> float:
    """Return the cosine below which this share of the pairs is: the lower edge of a bin."""
    total = np.cumsum(counts)
    if not total[-1]:
        return -1.0
    at = int(np.searchsorted(total, share * total[-1], side="left"))
    return at / _BINS * 2 - 1

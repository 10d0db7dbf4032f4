"""The positive texts of each image in a global batch, and their targets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cn_clip.distributed import all_gather_rows, all_reduce_sum
from cn_clip.errors import UsageError
from cn_clip.train.loss_block import Block
from cn_clip.translation import _


@dataclass(frozen=True, slots=True)
class _Groups:
    """All pairs, grouped by one key."""

    of: Tensor  # (N,), group of each pair
    members: Tensor  # (N,), pairs, sorted by group
    starts: Tensor  # (G,), start of each group in members
    sizes: Tensor  # (G,)

    @classmethod
    def by(cls, key: Tensor) -> _Groups:
        _, of, sizes = torch.unique(key, return_inverse=True, return_counts=True)
        return cls(of, of.argsort(), sizes.cumsum(0) - sizes, sizes)


@dataclass(frozen=True, slots=True)
class Positives:
    """The positive texts of each image, and their targets.

    The target of a positive (i, j) is ``weights[i] + weights[j]``, the sum over the softmax of the
    row and that of the column. Without groups, the positives are (i, i).
    """

    weights: Tensor  # (N,)
    groups: list[_Groups]

    def of_rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the indexes (P,), (P,) of the positives in a range of rows, without repetition."""
        device = self.weights.device
        if not self.groups:
            own = torch.arange(first, first + count, device=device)
            return own, own
        rows, columns = [], []
        for at, groups in enumerate(self.groups):
            group = groups.of[first : first + count]
            sizes = groups.sizes[group]
            begins = groups.starts[group] - (sizes.cumsum(0) - sizes)
            row = torch.arange(first, first + count, device=device).repeat_interleave(sizes)
            member = torch.arange(len(row), device=device) + begins.repeat_interleave(sizes)
            column = groups.members[member]
            new = torch.ones_like(row, dtype=torch.bool)
            for earlier in self.groups[:at]:
                new &= earlier.of[row] != earlier.of[column]
            rows.append(row[new])
            columns.append(column[new])
        return torch.cat(rows), torch.cat(columns)


def positives_of(block: Block, keys: Tensor | None, *, spread: bool) -> Positives:
    """Return the positives; targets are 1, or with ``spread`` sum to 1 in each row and column."""
    weights = block.texts.new_full((block.total,), 1 if spread else 0.5)
    if keys is None:
        return Positives(weights, [])
    if len(keys) != len(block.image):
        raise UsageError(
            _(
                "{key_count} keys for {image_count} pairs",
                key_count=len(keys),
                image_count=len(block.image),
            )
        )
    keys = all_gather_rows(keys.to(weights.device), counts=block.counts)
    positives = Positives(weights, [_Groups.by(key) for key in keys.unbind(1)])
    if not spread:
        return positives
    counts = torch.zeros_like(weights)
    for part in block.parts():
        rows, _unused = positives.of_rows(block.own.start + part.start, part.stop - part.start)
        counts += rows.bincount(minlength=block.total)
    return replace(positives, weights=1 / all_reduce_sum(counts))


def subtract_positives(
    residual: Tensor,
    logits: Tensor,
    block: Block,
    positives: Positives,
    part: slice,
    *,
    weight: float = 1,
) -> Tensor:
    """Subtract the targets of a chunk, times ``weight``, from ``residual`` (n, N), in place.

    Returns:
        (n,), the sum over each row of what was subtracted, times the logits.
    """
    first = block.own.start + part.start
    rows, columns = positives.of_rows(first, len(logits))
    targets = (positives.weights[rows] + positives.weights[columns]) * weight
    at = rows - first, columns
    residual[at] -= targets  # the indexes are unique
    return logits.new_zeros(len(logits)).index_add_(0, at[0], targets * logits[at])

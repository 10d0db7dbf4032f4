"""One rank's block of logits, computed in chunks of rows, with its log-sum-exps and gradients.

A rank computes a block of rows: its b images against the N texts of all ranks. The log-sum-exp of a
row is complete there; that of a column is reduced from N values of each rank, so one block serves
both directions and only texts are gathered. The block is computed in chunks of rows, twice: the
first pass finds the log-sum-exps, the second the loss and its gradients. Gradients are computed
with the value, so that no chunk is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cn_clip.distributed import (
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    rank,
    row_counts,
    world_size,
)
from cn_clip.errors import UsageError
from cn_clip.translation import _

_CHUNK_BYTES = 32 << 20  # of a chunk's logits
_MIN_ROWS = 128  # with fewer, memory traffic of the texts' gradients dominates


@dataclass(frozen=True, slots=True)
class Block:
    """This rank's images, the texts of all ranks, and buffers for a chunk of their logits."""

    image: Tensor  # (b, D)
    texts: Tensor  # (N, D)
    scale: Tensor
    counts: list[int]  # pairs of each rank
    buffers: tuple[Tensor, Tensor]  # (chunk, N) each; reused, since allocation is slow

    @property
    def total(self) -> int:
        return len(self.texts)

    @property
    def own(self) -> slice:
        """This rank's slice of all pairs."""
        first = sum(self.counts[: rank()])
        return slice(first, first + len(self.image))

    def parts(self) -> Iterator[slice]:
        step = len(self.buffers[0])
        for start in range(0, len(self.image), step):
            yield slice(start, min(start + step, len(self.image)))

    def logits(self, part: slice) -> Tensor:
        """Compute the logits (n, N) of a chunk into the first buffer."""
        return torch.mm(self.image[part] * self.scale, self.texts.T, out=self._buffer(0, part))

    def spare(self, part: slice) -> Tensor:
        """Return the second buffer in the shape of a chunk's logits."""
        return self._buffer(1, part)

    def _buffer(self, index: int, part: slice) -> Tensor:
        return self.buffers[index][: part.stop - part.start]


def block_of(image: Tensor, text: Tensor, logit_scale: Tensor, chunk: int | None) -> Block:
    if image.shape != text.shape or image.dim() != 2:
        raise UsageError(
            _(
                "image embeddings {shape} and text embeddings {text_shape} do not have the same "
                "shape (b, D)",
                shape=tuple(image.shape),
                text_shape=tuple(text.shape),
            )
        )
    image, text = as_float(image), as_float(text)
    counts = row_counts(text)
    total = total_of(counts)
    if chunk is None:
        chunk = max(_MIN_ROWS, _CHUNK_BYTES // (total * image.element_size()))
    chunk = max(1, min(chunk, len(image)))
    return Block(
        image,
        all_gather_rows(text, counts=counts),
        logit_scale.to(image),
        counts,
        (image.new_empty(chunk, total), image.new_empty(chunk, total)),
    )


def as_float(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def total_of(counts: list[int]) -> int:
    if total := sum(counts):
        return total
    raise UsageError(_("a batch without pairs has no loss; skip it"))


@dataclass(frozen=True, slots=True)
class Sums:
    """Log-sum-exps in two parts: the maximum, and the sum of exponentials relative to it.

    Their sum would be rounded: a well separated pair has a large logit and a sum just above 1.
    """

    row_max: Tensor  # (b,)
    rows: Tensor  # (b,)
    column_max: Tensor  # (N,)
    columns: Tensor  # (N,)


def sums_of(block: Block) -> Sums:
    """Return the sums of this rank's rows, and those of the columns over all ranks."""
    row_max = block.image.new_empty(len(block.image))
    rows = torch.empty_like(row_max)
    column_max = block.image.new_full((block.total,), -torch.inf)
    columns = block.image.new_zeros(block.total)
    for part in block.parts():
        logits, spare = block.logits(part), block.spare(part)
        row_max[part] = logits.amax(1)
        rows[part] = torch.sub(logits, row_max[part, None], out=spare).exp_().sum(1)
        higher = torch.maximum(column_max, logits.amax(0))
        columns.mul_((column_max - higher).exp_()).add_(logits.sub_(higher).exp_().sum(0))
        column_max = higher
    highest = all_reduce_max(column_max)
    columns = all_reduce_sum(columns * (column_max - highest).exp_())
    return Sums(row_max, rows, highest, columns)


def both_softmaxes(block: Block, part: slice, sums: Sums) -> Tensor:
    """Return the softmax over texts plus the softmax over images, (n, N), of a chunk."""
    logits, result = block.logits(part), block.spare(part)
    torch.sub(logits, sums.row_max[part, None], out=result)
    result.exp_().div_(sums.rows[part, None])
    return result.addcdiv_(logits.sub_(sums.column_max).exp_(), sums.columns)


class Gradients:
    """Gradients of embeddings and logit scale, accumulated chunk by chunk."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._image = torch.empty_like(block.image)  # divided by the scale, as are the texts'
        self._texts = torch.zeros_like(block.texts)

    def add(self, part: slice, residual: Tensor) -> None:
        """Add the gradient (n, N) of the loss with respect to the logits of a chunk."""
        torch.mm(residual, self._block.texts, out=self._image[part])
        self._texts.addmm_(residual.T, self._block.image[part])

    def of_inputs(self, factor: float) -> list[Tensor]:
        """Return the gradients of this rank's image, text and scale, times ``factor``."""
        # Not reduce-scatter: gloo lacks it in some supported versions of torch.
        text = all_reduce_sum(self._texts)[self._block.own]
        scale = (self._block.image * self._image).sum()  # sum of residual x cosine, reordered
        factor *= world_size()
        by_scale = self._block.scale * factor
        return [self._image * by_scale, text * by_scale, scale * factor]

"""Losses of the global batch in chunks; no process ever has all N x N similarities.

A rank computes a block of rows: its b images against the N texts of all ranks. The log-sum-exp of a
row is complete there; that of a column is reduced from N values of each rank, so one block serves
both directions and only texts are gathered. The block is computed in chunks of rows, twice: the
first pass finds the log-sum-exps, the second the loss and its gradients. Gradients are computed
with the value, so that no chunk is kept.

Every function returns the loss of the global batch on every rank. The gradients are ``world_size``
times those of this rank's part, because ``DistributedDataParallel`` averages over ranks; their mean
is the gradient of the global batch. Ranks may have different numbers of pairs, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cn_clip.distributed import (
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    rank,
    row_counts,
    world_size,
)
from cn_clip.errors import UsageError

_CHUNK_BYTES = 32 << 20  # of a chunk's logits
_MIN_ROWS = 128  # with fewer, memory traffic of the texts' gradients dominates


@dataclass(frozen=True, slots=True)
class Teacher:
    """The teacher's outputs for the same pairs.

    Attributes:
        image, text: unit-length embeddings (b, Dt), of any width Dt.
        logit_scale: the teacher's factor on cosines.
        weight: weight of the teacher in the targets, 0 to 1.
    """

    image: Tensor
    text: Tensor
    logit_scale: float
    weight: float

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise UsageError(f"the teacher's weight is {self.weight}; give 0 to 1")


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    keys: Tensor | None = None,
    teacher: Teacher | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the mean cross-entropy of images to texts and texts to images, a scalar.

    Radford et al., arXiv:2103.00020, figure 3. With ``keys``, pairs with a common key are each
    other's positives, and the target is uniform over them (UniCL, Yang et al., arXiv:2204.03610,
    section 3.2), so a caption that occurs twice in the batch is not its own negative. With a
    ``teacher``, the targets are mixed with the softmax of its scaled similarities (Hinton et al.,
    arXiv:1503.02531; for CLIP, Yang et al., arXiv:2307.12732, contrastive relational distillation).

    Args:
        image, text: unit-length embeddings (b, D) of this rank's pairs. Computation is in float32,
            or in float64 for float64 inputs.
        logit_scale: factor on cosines, a tensor of one element.
        keys: int64 (b, K); pairs that agree in any column are positives.
        teacher: outputs of a model to distill from.
        chunk: rows of logits in memory at a time; by default 32 MB of them.

    Raises:
        UsageError: shapes do not match, or no rank has a pair.
    """
    needs_grad = torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        block = _block(image, text, logit_scale, chunk)
        positives = _positives(block, keys, spread=True)
        sums = _sums(block)
        teacher_block = None
        if teacher is not None:
            scale = torch.tensor(teacher.logit_scale, device=image.device)
            teacher_block = _block(teacher.image, teacher.text, scale, len(block.buffers[0]))
            if teacher_block.counts != block.counts:
                raise UsageError(
                    f"the teacher has {teacher_block.counts} pairs, the student {block.counts}"
                )
            teacher_sums = _sums(teacher_block)
        weight = teacher.weight if teacher else 0.0
        target_logits = torch.zeros_like(sums.rows)  # (b,), sum of targets times logits
        gradients = _Gradients(block)
        for part in block.parts():
            logits, residual = block.logits(part), block.spare(part)
            torch.sub(logits, sums.row_max[part, None], out=residual)
            residual.exp_().div_(sums.rows[part, None])
            target_logits[part] = _subtract_positives(
                residual, logits, block, positives, part, weight=1 - weight
            )
            if teacher_block is not None:
                targets = _both_softmaxes(teacher_block, part, teacher_sums)
                target_logits[part] += torch.linalg.vecdot(targets, logits) * weight
                residual.sub_(targets, alpha=weight)
            if needs_grad:
                logits.sub_(sums.column_max).exp_()
                gradients.add(part, residual.addcdiv_(logits, sums.columns))
        # Terms cancel within each row; sums over all rows are far larger, and would lose digits.
        losses = (sums.row_max + sums.column_max[block.own] - target_logits).add_(
            sums.rows.log() + sums.columns[block.own].log()
        )
        value = all_reduce_sum(losses.sum()) / (2 * block.total)
        if not needs_grad:
            return value
        input_gradients = gradients.of_inputs(1 / (2 * block.total))
    return _with_gradients(value, input_gradients, image, text, logit_scale)


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    keys: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the sigmoid loss of all N x N pairings, summed over texts and averaged over images.

    Zhai et al., "SigLIP", arXiv:2303.15343, algorithm 1. With ``keys``, pairs with a common key are
    positives too. Arguments as in ``clip_loss``; ``logit_bias``, a tensor of one element, is added
    to the logits.

    Raises:
        UsageError: shapes do not match, or no rank has a pair.
    """
    needs_grad = torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        block = _block(image, text, logit_scale, chunk)
        positives = _positives(block, keys, spread=False)
        losses = block.image.new_zeros(len(block.image))
        bias = logit_bias.to(losses)
        bias_gradient = torch.zeros_like(bias)
        gradients = _Gradients(block)
        for part in block.parts():
            logits, residual = block.logits(part).add_(bias), block.spare(part)
            torch.sigmoid(logits, out=residual)
            target_logits = _subtract_positives(residual, logits, block, positives, part)
            losses[part] = F.softplus(logits).sum(1) - target_logits
            if needs_grad:
                bias_gradient += residual.sum()
                gradients.add(part, residual)
        value = all_reduce_sum(losses.sum()) / block.total
        if not needs_grad:
            return value
        input_gradients = gradients.of_inputs(1 / block.total)
        input_gradients.append(bias_gradient * (world_size() / block.total))
    return _with_gradients(value, input_gradients, image, text, logit_scale, logit_bias)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 minus the mean cosine between features (b, D) and the teacher's, a scalar.

    Both have the same width; a student of another width is projected before.

    Raises:
        UsageError: shapes do not match, or no rank has a feature.
    """
    if student.shape != teacher.shape:
        raise UsageError(
            f"features {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the "
            "teacher differ in shape; project the student's to the teacher's width"
        )
    cosines = F.cosine_similarity(_float(student), _float(teacher.detach()), dim=-1)
    total = _total(row_counts(student))
    value = 1 - all_reduce_sum(cosines.sum()) / total
    own = -cosines.sum() * (world_size() / total)
    return value + (own - own.detach())  # value of all ranks, gradient of this one


@dataclass(frozen=True, slots=True)
class _Block:
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


def _block(image: Tensor, text: Tensor, logit_scale: Tensor, chunk: int | None) -> _Block:
    if image.shape != text.shape or image.dim() != 2:
        raise UsageError(
            f"image embeddings {tuple(image.shape)} and text embeddings {tuple(text.shape)} "
            "do not have the same shape (b, D)"
        )
    image, text = _float(image), _float(text)
    counts = row_counts(text)
    total = _total(counts)
    if chunk is None:
        chunk = max(_MIN_ROWS, _CHUNK_BYTES // (total * image.element_size()))
    chunk = max(1, min(chunk, len(image)))
    return _Block(
        image,
        all_gather_rows(text, counts=counts),
        logit_scale.to(image),
        counts,
        (image.new_empty(chunk, total), image.new_empty(chunk, total)),
    )


def _float(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _total(counts: list[int]) -> int:
    if total := sum(counts):
        return total
    raise UsageError("a batch without pairs has no loss; skip it")


@dataclass(frozen=True, slots=True)
class _Sums:
    """Log-sum-exps in two parts: the maximum, and the sum of exponentials relative to it.

    Their sum would be rounded: a well separated pair has a large logit and a sum just above 1.
    """

    row_max: Tensor  # (b,)
    rows: Tensor  # (b,)
    column_max: Tensor  # (N,)
    columns: Tensor  # (N,)


def _sums(block: _Block) -> _Sums:
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
    return _Sums(row_max, rows, highest, columns)


def _both_softmaxes(block: _Block, part: slice, sums: _Sums) -> Tensor:
    """Return the softmax over texts plus the softmax over images, (n, N), of a chunk."""
    logits, result = block.logits(part), block.spare(part)
    torch.sub(logits, sums.row_max[part, None], out=result)
    result.exp_().div_(sums.rows[part, None])
    return result.addcdiv_(logits.sub_(sums.column_max).exp_(), sums.columns)


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
class _Positives:
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


def _positives(block: _Block, keys: Tensor | None, *, spread: bool) -> _Positives:
    """Return the positives; targets are 1, or with ``spread`` sum to 1 in each row and column."""
    weights = block.texts.new_full((block.total,), 1 if spread else 0.5)
    if keys is None:
        return _Positives(weights, [])
    if len(keys) != len(block.image):
        raise UsageError(f"{len(keys)} keys for {len(block.image)} pairs")
    keys = all_gather_rows(keys.to(weights.device), counts=block.counts)
    positives = _Positives(weights, [_Groups.by(key) for key in keys.unbind(1)])
    if not spread:
        return positives
    counts = torch.zeros_like(weights)
    for part in block.parts():
        rows, _ = positives.of_rows(block.own.start + part.start, part.stop - part.start)
        counts += rows.bincount(minlength=block.total)
    return replace(positives, weights=1 / all_reduce_sum(counts))


def _subtract_positives(
    residual: Tensor,
    logits: Tensor,
    block: _Block,
    positives: _Positives,
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


class _Gradients:
    """Gradients of embeddings and logit scale, accumulated chunk by chunk."""

    def __init__(self, block: _Block) -> None:
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


class _PrecomputedGradients(torch.autograd.Function):
    """A value whose gradients were computed with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(
            *(g.reshape(x.shape).to(x.dtype) for g, x in zip(gradients, inputs, strict=True))
        )
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *((outer * g).to(g.dtype) for g in ctx.saved_tensors)


def _with_gradients(value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
    return cast(Tensor, _PrecomputedGradients.apply(value, gradients, *inputs))  # type: ignore[no-untyped-call]

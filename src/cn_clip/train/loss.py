"""Losses of the global batch, block by block; no process ever has all N x N similarities.

Every function returns the loss of the global batch on every rank. The gradients are ``world_size``
times those of this rank's part, because ``DistributedDataParallel`` averages over ranks; their mean
is the gradient of the global batch. Ranks may have different numbers of pairs, or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cn_clip.distributed import all_reduce_sum, row_counts, world_size
from cn_clip.errors import UsageError
from cn_clip.train.loss_block import (
    Gradients,
    as_float,
    block_of,
    both_softmaxes,
    sums_of,
    total_of,
)
from cn_clip.train.loss_positives import positives_of, subtract_positives
from cn_clip.translation import _


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
            raise UsageError(_("the teacher's weight is {weight}; give 0 to 1", weight=self.weight))


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
        block = block_of(image, text, logit_scale, chunk)
        positives = positives_of(block, keys, spread=True)
        sums = sums_of(block)
        teacher_block = None
        if teacher is not None:
            scale = torch.tensor(teacher.logit_scale, device=image.device)
            teacher_block = block_of(teacher.image, teacher.text, scale, len(block.buffers[0]))
            if teacher_block.counts != block.counts:
                raise UsageError(
                    _(
                        "the teacher has {counts} pairs, the student {block_counts}",
                        counts=teacher_block.counts,
                        block_counts=block.counts,
                    )
                )
            teacher_sums = sums_of(teacher_block)
        weight = teacher.weight if teacher else 0.0
        target_logits = torch.zeros_like(sums.rows)  # (b,), sum of targets times logits
        gradients = Gradients(block)
        for part in block.parts():
            logits, residual = block.logits(part), block.spare(part)
            torch.sub(logits, sums.row_max[part, None], out=residual)
            residual.exp_().div_(sums.rows[part, None])
            target_logits[part] = subtract_positives(
                residual, logits, block, positives, part, weight=1 - weight
            )
            if teacher_block is not None:
                targets = both_softmaxes(teacher_block, part, teacher_sums)
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
        block = block_of(image, text, logit_scale, chunk)
        positives = positives_of(block, keys, spread=False)
        losses = block.image.new_zeros(len(block.image))
        bias = logit_bias.to(losses)
        bias_gradient = torch.zeros_like(bias)
        gradients = Gradients(block)
        for part in block.parts():
            logits, residual = block.logits(part).add_(bias), block.spare(part)
            torch.sigmoid(logits, out=residual)
            target_logits = subtract_positives(residual, logits, block, positives, part)
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
            _(
                "features {shape} of the student and {teacher_shape} of the teacher differ in "
                "shape; project the student's to the teacher's width",
                shape=tuple(student.shape),
                teacher_shape=tuple(teacher.shape),
            )
        )
    cosines = F.cosine_similarity(as_float(student), as_float(teacher.detach()), dim=-1)
    total = total_of(row_counts(student))
    value = 1 - all_reduce_sum(cosines.sum()) / total
    own = -cosines.sum() * (world_size() / total)
    return value + (own - own.detach())  # value of all ranks, gradient of this one


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

"""Losses of the global batch; no process ever holds its N x N similarities.

A rank owns a block of rows: its b images against the N texts of all ranks. The log-sum-exp of a row
is complete there; that of a column is put together from N numbers of each rank, so the block serves
both directions and only texts are gathered. The block itself exists a chunk of rows at a time: a
first pass over the chunks finds the log-sum-exps, a second computes each chunk again, and from it
the loss and its gradients. Computing them along with the value is what lets a chunk be forgotten.

Every function returns the loss of the global batch on every rank. Its gradients are ``world_size``
times this rank's share, so that ``DistributedDataParallel``, which averages over ranks, ends at the
gradient of one process that holds the whole batch. Ranks may hold different numbers of pairs, or
none.
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
_FEWEST_ROWS = 128  # below, reading and writing the texts' gradients costs more than multiplying


@dataclass(frozen=True, slots=True)
class Teacher:
    """What a frozen model says of the same pairs.

    Attributes:
        image, text: its unit-length embeddings (b, Dt), of any width Dt.
        logit_scale: its factor on cosines.
        weight: share of the targets that is the teacher's, 0 to 1.
    """

    image: Tensor
    text: Tensor
    logit_scale: float
    weight: float

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise UsageError(f"the teacher's weight is {self.weight}; it is a share, from 0 to 1")


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

    Radford et al., arXiv:2103.00020, figure 3. With ``keys``, all pairs that share one are each
    other's positives, and the target is uniform over them (UniCL, Yang et al., arXiv:2204.03610,
    section 3.2): a caption that occurs twice in the batch is not its own negative. With a
    ``teacher``, its share of the targets is the softmax of its own scaled similarities (Hinton et
    al., arXiv:1503.02531; for CLIP, Yang et al., arXiv:2307.12732, contrastive relational
    distillation).

    Args:
        image, text: unit-length embeddings (b, D) of this rank's pairs. Computed in float32, or
            float64 if they are.
        logit_scale: factor on cosines, a tensor of one element.
        keys: int64 (b, K), pairs that agree in any column belong together.
        chunk: rows of logits that exist at a time; by default, 32 MB of them.

    Raises:
        UsageError: shapes do not match, or no rank has a pair.
    """
    wanted = torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        block = _block(image, text, logit_scale, chunk)
        positives = _positives(block, keys, spread=True)
        sums = _sums(block)
        taught = None
        if teacher is not None:
            scale = torch.tensor(teacher.logit_scale, device=image.device)
            taught = _block(teacher.image, teacher.text, scale, len(block.buffers[0]))
            if taught.counts != block.counts:
                raise UsageError(
                    f"the teacher has {taught.counts} pairs, the student {block.counts}"
                )
            taught_sums = _sums(taught)
        share = teacher.weight if teacher else 0.0
        met = torch.zeros_like(sums.rows)  # each row's targets times its logits
        gradients = _Gradients(block)
        for part in block.parts():
            logits, residual = block.logits(part), block.spare(part)
            torch.sub(logits, sums.row_tops[part, None], out=residual)
            residual.exp_().div_(sums.rows[part, None])
            met[part] = _subtract_positives(
                residual, logits, block, positives, part, share=1 - share
            )
            if taught is not None:
                targets = _both_softmaxes(taught, part, taught_sums)
                met[part] += torch.linalg.vecdot(targets, logits) * share
                residual.sub_(targets, alpha=share)
            if wanted:
                logits.sub_(sums.column_tops).exp_()
                gradients.add(part, residual.addcdiv_(logits, sums.columns))
        # What cancels does so row by row, before adding up: the sums of all are far larger.
        losses = (sums.row_tops + sums.column_tops[block.own] - met).add_(
            sums.rows.log() + sums.columns[block.own].log()
        )
        value = all_reduce_sum(losses.sum()) / (2 * block.total)
        if not wanted:
            return value
        found = gradients.of_inputs(1 / (2 * block.total))
    return _known(value, found, image, text, logit_scale)


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    keys: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the mean over images of the sigmoid losses of all their pairings, a scalar.

    Zhai et al., "SigLIP", arXiv:2303.15343, algorithm 1: of all N x N pairings, those that belong
    together are to have a logit above 0. With ``keys``, that is all pairs that share one. Arguments
    as in ``clip_loss``; ``logit_bias``, a tensor of one element, is added to the logits.

    Raises:
        UsageError: shapes do not match, or no rank has a pair.
    """
    wanted = torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        block = _block(image, text, logit_scale, chunk)
        positives = _positives(block, keys, spread=False)
        losses = block.image.new_zeros(len(block.image))
        bias = logit_bias.to(losses)
        pull_of_bias = torch.zeros_like(bias)
        gradients = _Gradients(block)
        for part in block.parts():
            logits, residual = block.logits(part).add_(bias), block.spare(part)
            torch.sigmoid(logits, out=residual)
            met = _subtract_positives(residual, logits, block, positives, part)
            losses[part] = F.softplus(logits).sum(1) - met
            if wanted:
                pull_of_bias += residual.sum()
                gradients.add(part, residual)
        value = all_reduce_sum(losses.sum()) / block.total
        if not wanted:
            return value
        found = gradients.of_inputs(1 / block.total)
        found.append(pull_of_bias * (world_size() / block.total))
    return _known(value, found, image, text, logit_scale, logit_bias)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 minus the mean cosine of features (b, D) with a teacher's, a scalar.

    Both in the same width: the student's after a learned projection, if its own is another.

    Raises:
        UsageError: shapes do not match, or no rank has a feature.
    """
    if student.shape != teacher.shape:
        raise UsageError(
            f"features {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the "
            "teacher differ in shape; project the student's to the teacher's width"
        )
    cosines = F.cosine_similarity(_precise(student), _precise(teacher.detach()), dim=-1)
    total = _total(row_counts(student))
    value = 1 - all_reduce_sum(cosines.sum()) / total
    own = -cosines.sum() * (world_size() / total)
    return value + (own - own.detach())  # the value of all ranks, the gradient of this one


@dataclass(frozen=True, slots=True)
class _Block:
    """This rank's images against the texts of all ranks, and room for a chunk of their logits."""

    image: Tensor  # (b, D)
    texts: Tensor  # (N, D)
    scale: Tensor
    counts: list[int]  # pairs of each rank
    buffers: tuple[Tensor, Tensor]  # (chunk, N) each; used again, for fresh memory is slow

    @property
    def total(self) -> int:
        return len(self.texts)

    @property
    def own(self) -> slice:
        """Where this rank's pairs are among all."""
        first = sum(self.counts[: rank()])
        return slice(first, first + len(self.image))

    def parts(self) -> Iterator[slice]:
        step = len(self.buffers[0])
        for start in range(0, len(self.image), step):
            yield slice(start, min(start + step, len(self.image)))

    def logits(self, part: slice) -> Tensor:
        """Compute the logits (n, N) of some rows, in the first buffer."""
        return torch.mm(self.image[part] * self.scale, self.texts.T, out=self._room(0, part))

    def spare(self, part: slice) -> Tensor:
        """Return the second buffer, as large as the logits of some rows."""
        return self._room(1, part)

    def _room(self, which: int, part: slice) -> Tensor:
        return self.buffers[which][: part.stop - part.start]


def _block(image: Tensor, text: Tensor, logit_scale: Tensor, chunk: int | None) -> _Block:
    if image.shape != text.shape or image.dim() != 2:
        raise UsageError(
            f"image embeddings {tuple(image.shape)} and text embeddings {tuple(text.shape)} "
            "are not two (b, D) of one shape"
        )
    image, text = _precise(image), _precise(text)
    counts = row_counts(text)
    total = _total(counts)
    if chunk is None:
        chunk = max(_FEWEST_ROWS, _CHUNK_BYTES // (total * image.element_size()))
    chunk = max(1, min(chunk, len(image)))
    return _Block(
        image,
        all_gather_rows(text, counts=counts),
        logit_scale.to(image),
        counts,
        (image.new_empty(chunk, total), image.new_empty(chunk, total)),
    )


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _total(counts: list[int]) -> int:
    if total := sum(counts):
        return total
    raise UsageError("a batch without pairs has no loss; skip it")


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums of exponentials, each over the exponential of its largest term.

    Both apart, not as one log-sum-exp: of a pair that is told from all others, which has a large
    logit and a sum just above 1, the rounded log-sum-exp would say nothing more.
    """

    row_tops: Tensor  # (b,), as the next
    rows: Tensor
    column_tops: Tensor  # (N,), as the next
    columns: Tensor


def _sums(block: _Block) -> _Sums:
    """Return the sums of this rank's rows, and of the columns over all ranks."""
    row_tops = block.image.new_empty(len(block.image))
    rows = torch.empty_like(row_tops)
    tops = block.image.new_full((block.total,), -torch.inf)
    columns = block.image.new_zeros(block.total)
    for part in block.parts():
        logits, spare = block.logits(part), block.spare(part)
        row_tops[part] = logits.amax(1)
        rows[part] = torch.sub(logits, row_tops[part, None], out=spare).exp_().sum(1)
        higher = torch.maximum(tops, logits.amax(0))
        columns.mul_((tops - higher).exp_()).add_(logits.sub_(higher).exp_().sum(0))
        tops = higher
    highest = all_reduce_max(tops)
    columns = all_reduce_sum(columns * (tops - highest).exp_())
    return _Sums(row_tops, rows, highest, columns)


def _both_softmaxes(block: _Block, part: slice, sums: _Sums) -> Tensor:
    """Return the softmax over texts plus the softmax over images, (n, N), of some rows."""
    logits, result = block.logits(part), block.spare(part)
    torch.sub(logits, sums.row_tops[part, None], out=result)
    result.exp_().div_(sums.rows[part, None])
    return result.addcdiv_(logits.sub_(sums.column_tops).exp_(), sums.columns)


@dataclass(frozen=True, slots=True)
class _Groups:
    """All pairs, in groups that agree in a key."""

    of: Tensor  # (N,): the group of each pair
    members: Tensor  # (N,): pairs, a group after the other
    starts: Tensor  # (G,): where in it each group begins
    sizes: Tensor  # (G,)

    @classmethod
    def by(cls, key: Tensor) -> _Groups:
        _, of, sizes = torch.unique(key, return_inverse=True, return_counts=True)
        return cls(of, of.argsort(), sizes.cumsum(0) - sizes, sizes)


@dataclass(frozen=True, slots=True)
class _Positives:
    """Which of all texts belong to this rank's images, and what they are to reach.

    The target of an image i and a text j that belong together is ``weights[i] + weights[j]``: what
    row and column give. Without groups, each image has its own text alone.
    """

    weights: Tensor  # (N,)
    groups: list[_Groups]

    def of_rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return rows and columns (P,) of what belongs together in some rows of all, each once."""
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
    """Find what belongs together; each target is 1, or ``spread`` to a sum of 1 either way."""
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
    share: float = 1,
) -> Tensor:
    """Subtract the targets of some rows, times ``share``, from their ``residual`` (n, N).

    Returns:
        (n,): what was subtracted from each row, times its logits.
    """
    first = block.own.start + part.start
    rows, columns = positives.of_rows(first, len(logits))
    targets = (positives.weights[rows] + positives.weights[columns]) * share
    at = rows - first, columns
    residual[at] -= targets  # no place occurs twice
    return logits.new_zeros(len(logits)).index_add_(0, at[0], targets * logits[at])


class _Gradients:
    """Gradients of embeddings and scale, added up a chunk at a time."""

    def __init__(self, block: _Block) -> None:
        self._block = block
        self._image = torch.empty_like(block.image)  # over the scale, as the next
        self._texts = torch.zeros_like(block.texts)

    def add(self, part: slice, residual: Tensor) -> None:
        """Take in the derivative (n, N) of a loss by the logits of some rows."""
        torch.mm(residual, self._block.texts, out=self._image[part])
        self._texts.addmm_(residual.T, self._block.image[part])

    def of_inputs(self, factor: float) -> list[Tensor]:
        """Return those of this rank's image, text and scale, for a loss times ``factor``."""
        # gloo has no reduce-scatter in every version of torch; one path for all is one to test.
        text = all_reduce_sum(self._texts)[self._block.own]
        scale = (self._block.image * self._image).sum()  # sum of residual x cosine, reordered
        factor *= world_size()
        by_scale = self._block.scale * factor
        return [self._image * by_scale, text * by_scale, scale * factor]


class _Known(torch.autograd.Function):
    """A value whose gradients were computed beside it."""

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


def _known(value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
    return cast(Tensor, _Known.apply(value, gradients, *inputs))  # type: ignore[no-untyped-call]

"""One step: the gradients of a global batch, whatever fits into memory at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_clip import distributed
from cn_clip.embedder import Embedder
from cn_clip.model.clip import CLIP
from cn_clip.train.batches.batch import Share
from cn_clip.train.batches.text_targets import Sentences
from cn_clip.train.loss import Teacher, clip_loss, feature_loss, sigmoid_loss
from cn_clip.train.model.freeze import learns
from cn_clip.train.recipe.schema import Stage

_SIGMOID_BIAS = -10.0  # SigLIP's start: most pairs do not match


class Heads(nn.Module):
    """What is learned beside the model and left out of it at the end: SigLIP's bias, and the
    projections to a teacher's space."""

    def __init__(self, stage: Stage, dim: int, teacher_dim: int | None) -> None:
        super().__init__()
        self.logit_bias = (
            nn.Parameter(torch.tensor(_SIGMOID_BIAS)) if stage.loss.kind == "sigmoid" else None
        )
        projected = teacher_dim is not None and stage.loss.teacher_features > 0
        self.image = nn.Linear(dim, teacher_dim) if projected and teacher_dim else None
        self.text = nn.Linear(dim, teacher_dim) if projected and teacher_dim else None


class Outputs(NamedTuple):
    """What the towers give for B pairs; vectors have unit length."""

    image: Tensor  # (B, D)
    text: Tensor  # (B, D)
    logit_scale: Tensor  # (), the factor on cosines
    logit_bias: Tensor | None = None  # (), of the sigmoid loss
    image_for_teacher: Tensor | None = None  # (B, T), projected to the teacher's space
    text_for_teacher: Tensor | None = None  # (B, T)
    sentences: Tensor | None = None  # (S, D), of texts that have target embeddings


class Towers(nn.Module):
    """The model and its heads as one call, which is what DDP wraps."""

    def __init__(self, model: CLIP, heads: Heads, stage: Stage) -> None:
        super().__init__()
        self.model, self.heads = model, heads
        self.mask_ratio = stage.mask_ratio
        config = model.config
        self.register_buffer(
            "mean", torch.tensor(config.image_mean)[:, None, None], persistent=False
        )
        self.register_buffer("std", torch.tensor(config.image_std)[:, None, None], persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(
        self,
        pixels: Tensor | None,
        features: Tensor | None,
        ids: Tensor,
        sentences: Tensor | None = None,
    ) -> Outputs:
        """Run images, as pixels or as cached features, and texts."""
        if features is None:
            assert pixels is not None
            features = self.encode_pixels(pixels)
        heads = self.heads
        image = F.normalize(features.float(), dim=-1)
        text = F.normalize(self.model.encode_text(ids).float(), dim=-1)
        return Outputs(
            image,
            text,
            logit_scale=self.model.logit_scale.exp(),
            logit_bias=None if heads.logit_bias is None else heads.logit_bias + 0.0,
            image_for_teacher=_projected(heads.image, image),
            text_for_teacher=_projected(heads.text, text),
            sentences=None
            if sentences is None
            else F.normalize(self.model.encode_text(sentences).float(), dim=-1),
        )

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) to features (B, D)."""
        images = (pixels.float() / 255 - self.mean) / self.std
        if self.model.config.vision.kind != "vit":
            images = images.contiguous(memory_format=torch.channels_last)
        with nullcontext() if learns(self.model.visual) else torch.no_grad():
            return self.model.encode_image(images, self.mask_ratio)


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers a step computes in, and how its gradients are scaled.

    ``autocast`` is the dtype of the towers, None for float32; ``scaler`` is for float16.
    """

    device: torch.device
    autocast: torch.dtype | None
    scaler: torch.amp.GradScaler

    def towers(self) -> AbstractContextManager[object]:
        """Return the context that the towers run in."""
        return torch.autocast(
            self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None
        )


def backward(
    towers: nn.Module,
    share: Share,
    stage: Stage,
    numbers: Numbers,
    *,
    chunks: int,
    seed: tuple[int, ...],
    teacher: Embedder | None = None,
    sentences: Sentences | None = None,
) -> Tensor:
    """Add the gradients of a global batch's loss to the parameters.

    With one chunk, the towers run once. With more, by gradient caching (Gao et al., 2021,
    arXiv:2101.06983): all chunks run without gradients, the loss gives the gradients of the
    embeddings, and each chunk runs again to carry them on. Both passes draw the same dropout and
    masks, since each chunk has a seed of its own.

    Returns:
        The loss over the global batch, ().

    Args:
        towers: ``Towers``, or DDP or FSDP around it.
        share: this process's part of the batch.
        stage: its loss.
        numbers: precision and scaler.
        chunks: in how many parts to run; the same on all processes.
        seed: what the draws of this step depend on, such as (seed, stage, step).
        teacher: a model to learn from.
        sentences: texts to hold to where a sentence encoder put them.
    """
    device = numbers.device
    pixels = _split(share.pixels, chunks, device)
    features = _split(share.features, chunks, device)
    ids = _split(share.ids, chunks, device)
    more_ids = _split(None if sentences is None else sentences.ids, chunks, device)
    criterion = _criterion(share, stage, device, teacher, sentences)

    def run(number: int) -> Outputs:
        torch.manual_seed(_seed_of(*seed, distributed.rank(), number))
        with numbers.towers():
            # DDP returns the tuple's items
            return Outputs(*towers(pixels[number], features[number], ids[number], more_ids[number]))

    if chunks == 1:
        loss = criterion(run(0))
        numbers.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    with torch.no_grad(), _statistics_kept(towers):
        first = [run(number) for number in range(chunks)]
    joined = Outputs._make(_joined(column) for column in zip(*first, strict=True))
    loss = criterion(joined)
    numbers.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    gradients = [
        _gradient_of_each(whole, column)
        for whole, column in zip(joined, zip(*first, strict=True), strict=True)
    ]
    for number in range(chunks):
        last = number == chunks - 1
        with _syncing(towers, last):
            pairs = [
                # The gradient of a scalar is of all chunks: it counts once.
                (out, gradient[number] if out.ndim or last else torch.zeros_like(out))
                for out, gradient in zip(run(number), gradients, strict=True)
                if out is not None and out.requires_grad
            ]
            torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
    return loss.detach()


def _split(whole: Tensor | None, chunks: int, device: torch.device) -> Sequence[Tensor | None]:
    """Return the rows in so many parts, on the device."""
    if whole is None:
        return [None] * chunks
    return whole.to(device, non_blocking=True).tensor_split(chunks)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return the rows of all chunks, or the scalar that all share, as a leaf with a gradient."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    whole = torch.cat(present) if present[0].ndim else present[0].clone()
    return whole.requires_grad_()


def _gradient_of_each(whole: Tensor | None, parts: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """Return the gradient of ``whole`` for each of the chunks that it was joined from."""
    if whole is None:
        return []
    gradient = torch.zeros_like(whole) if whole.grad is None else whole.grad
    if not whole.ndim:
        return [gradient] * len(parts)
    return torch.split(gradient, [len(part) for part in parts if part is not None])


def _projected(head: nn.Linear | None, embeddings: Tensor) -> Tensor | None:
    return None if head is None else F.normalize(head(embeddings).float(), dim=-1)


def _criterion(
    share: Share,
    stage: Stage,
    device: torch.device,
    teacher: Embedder | None,
    sentences: Sentences | None,
) -> Callable[[Outputs], Tensor]:
    """Return the loss as a function of the towers' outputs."""
    options = stage.loss
    keys = share.keys.to(device) if options.duplicates else None
    taught = None if teacher is None else _taught(teacher, share, stage, device)

    def loss(out: Outputs) -> Tensor:
        if options.kind == "sigmoid":
            assert out.logit_bias is not None
            total = sigmoid_loss(out.image, out.text, out.logit_scale, out.logit_bias, keys=keys)
        else:
            mixed = taught if options.teacher_weight else None
            total = clip_loss(out.image, out.text, out.logit_scale, keys=keys, teacher=mixed)
        if taught is not None and options.teacher_features:
            assert out.image_for_teacher is not None and out.text_for_teacher is not None
            distance = feature_loss(out.image_for_teacher, taught.image)
            distance = distance + feature_loss(out.text_for_teacher, taught.text)
            total = total + options.teacher_features * distance / 2
        if sentences is not None:
            assert out.sentences is not None
            places = sentences.places.to(device)
            total = total + options.sentences_weight * feature_loss(out.sentences, places)
        return total

    return loss


def _taught(teacher: Embedder, share: Share, stage: Stage, device: torch.device) -> Teacher:
    """Let the teacher see the same pairs: the images as prepared for the student."""
    assert share.pixels is not None
    images = list(share.pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    return Teacher(
        image=torch.from_numpy(teacher.embed_images(images)).to(device),
        text=torch.from_numpy(teacher.embed_texts([row.text for row in share.rows])).to(device),
        logit_scale=teacher.logit_scale,
        weight=stage.loss.teacher_weight,
    )


def _seed_of(*parts: int) -> int:
    name = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "big")


@contextmanager
def _syncing(towers: nn.Module, last: bool) -> Iterator[None]:
    """Exchange gradients between processes only with the last chunk's."""
    if isinstance(towers, nn.parallel.DistributedDataParallel):
        with nullcontext() if last else towers.no_sync():
            yield
        return
    wait = getattr(towers.model, "set_requires_gradient_sync", None)  # FSDP2
    if wait is not None:
        wait(last)
    yield


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of BatchNorm alone: the second pass counts the batch."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

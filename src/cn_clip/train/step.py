"""One training step: the gradients of a global batch, with gradient caching for large ones."""

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
from cn_clip.train.batches.batch import LocalBatch
from cn_clip.train.batches.text_targets import TextTargetBatch
from cn_clip.train.loss import Teacher, clip_loss, feature_loss, sigmoid_loss
from cn_clip.train.model.freeze import is_trainable
from cn_clip.train.recipe.schema import Stage

_SIGMOID_BIAS = -10.0  # SigLIP's initial bias: most pairs do not match


class Heads(nn.Module):
    """Parameters that are trained with the model but are not part of it: SigLIP's bias, and the
    projections to the teacher's embedding width."""

    def __init__(self, stage: Stage, dim: int, teacher_dim: int | None) -> None:
        super().__init__()
        self.logit_bias = (
            nn.Parameter(torch.tensor(_SIGMOID_BIAS)) if stage.loss.kind == "sigmoid" else None
        )
        projected = teacher_dim is not None and stage.loss.teacher_features > 0
        self.image = nn.Linear(dim, teacher_dim) if projected and teacher_dim else None
        self.text = nn.Linear(dim, teacher_dim) if projected and teacher_dim else None


class Outputs(NamedTuple):
    """Outputs of the towers for B pairs; vectors have unit length."""

    image: Tensor  # (B, D)
    text: Tensor  # (B, D)
    logit_scale: Tensor  # (), factor on the cosines
    logit_bias: Tensor | None = None  # (), of the sigmoid loss
    image_for_teacher: Tensor | None = None  # (B, T), projected to the teacher's width
    text_for_teacher: Tensor | None = None  # (B, T)
    target_texts: Tensor | None = None  # (S, D), of texts that have target embeddings


class Towers(nn.Module):
    """The model and its heads in one forward call, the module that DDP wraps."""

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
        target_ids: Tensor | None = None,
    ) -> Outputs:
        """Encode images, from pixels or from cached features, and texts.

        Args:
            pixels: uint8 (B, 3, S, S), or None with ``features``.
            features: (B, D), or None.
            ids: (B, L).
            target_ids: (S, L), texts that have target embeddings, or None.
        """
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
            target_texts=None
            if target_ids is None
            else F.normalize(self.model.encode_text(target_ids).float(), dim=-1),
        )

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encode uint8 (B, 3, S, S) to features (B, D)."""
        images = (pixels.float() / 255 - self.mean) / self.std
        if self.model.config.vision.kind != "vit":
            images = images.contiguous(memory_format=torch.channels_last)
        with nullcontext() if is_trainable(self.model.visual) else torch.no_grad():
            return self.model.encode_image(images, self.mask_ratio)


@dataclass(frozen=True, slots=True)
class MixedPrecision:
    """The dtype of the towers (None for float32), and the loss scaler of float16."""

    device: torch.device
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context that the towers run in."""
        return torch.autocast(
            self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None
        )


def backward(
    towers: nn.Module,
    batch: LocalBatch,
    stage: Stage,
    precision: MixedPrecision,
    *,
    chunks: int,
    seed: tuple[int, ...],
    teacher: Embedder | None = None,
    text_targets: TextTargetBatch | None = None,
) -> Tensor:
    """Accumulate the gradients of the global batch's loss in the parameters.

    With more than one chunk, this is gradient caching (Gao et al., 2021, arXiv:2101.06983): all
    chunks run without gradients, the loss gives the gradients of the embeddings, and each chunk
    runs again to propagate them. Each chunk has its own seed, so both passes draw the same dropout
    and masks.

    Args:
        towers: ``Towers``, or DDP or FSDP around it.
        batch: this process's part of the global batch.
        stage: the stage, whose loss is used.
        precision: mixed precision and loss scaler.
        chunks: number of chunks; the same on all processes.
        seed: seed of the random draws, such as (seed, stage, step).
        teacher: model to distill from.
        text_targets: texts with target embeddings.

    Returns:
        The loss of the global batch, ().
    """
    device = precision.device
    pixels = _split(batch.pixels, chunks, device)
    features = _split(batch.features, chunks, device)
    ids = _split(batch.ids, chunks, device)
    target_ids = _split(None if text_targets is None else text_targets.ids, chunks, device)
    criterion = _criterion(batch, stage, device, teacher, text_targets)

    def run(n: int) -> Outputs:
        torch.manual_seed(_hash_seed(*seed, distributed.rank(), n))
        with precision.autocast():
            # DDP returns a plain tuple
            return Outputs(*towers(pixels[n], features[n], ids[n], target_ids[n]))

    if chunks == 1:
        loss = criterion(run(0))
        precision.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    with torch.no_grad(), _batch_norm_statistics_kept(towers):
        first_pass = [run(n) for n in range(chunks)]
    columns = list(zip(*first_pass, strict=True))  # each output, of all chunks
    joined = Outputs._make(_join(column) for column in columns)
    loss = criterion(joined)
    precision.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    gradients = [
        _chunk_gradients(tensor, column) for tensor, column in zip(joined, columns, strict=True)
    ]
    for n in range(chunks):
        last = n == chunks - 1
        with _gradient_sync(towers, last):
            pairs = [
                # The gradient of a scalar is that of all chunks, so it is added once.
                (out, gradient[n] if out.ndim or last else torch.zeros_like(out))
                for out, gradient in zip(run(n), gradients, strict=True)
                if out is not None and out.requires_grad
            ]
            torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
    return loss.detach()


def _split(tensor: Tensor | None, chunks: int, device: torch.device) -> Sequence[Tensor | None]:
    """Move a tensor to the device and split its rows into chunks."""
    if tensor is None:
        return [None] * chunks
    return tensor.to(device, non_blocking=True).tensor_split(chunks)


def _join(chunks: Sequence[Tensor | None]) -> Tensor | None:
    """Return the rows of all chunks, or their common scalar, as a leaf that requires a gradient."""
    present = [chunk for chunk in chunks if chunk is not None]
    if not present:
        return None
    joined = torch.cat(present) if present[0].ndim else present[0].clone()
    return joined.requires_grad_()


def _chunk_gradients(joined: Tensor | None, chunks: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """Split the gradient of ``joined`` by the chunks that it was joined from."""
    if joined is None:
        return []
    gradient = torch.zeros_like(joined) if joined.grad is None else joined.grad
    if not joined.ndim:
        return [gradient] * len(chunks)
    return torch.split(gradient, [len(chunk) for chunk in chunks if chunk is not None])


def _projected(head: nn.Linear | None, embeddings: Tensor) -> Tensor | None:
    return None if head is None else F.normalize(head(embeddings).float(), dim=-1)


def _criterion(
    batch: LocalBatch,
    stage: Stage,
    device: torch.device,
    teacher: Embedder | None,
    text_targets: TextTargetBatch | None,
) -> Callable[[Outputs], Tensor]:
    """Return the loss as a function of the towers' outputs."""
    options = stage.loss
    keys = batch.keys.to(device) if options.duplicates else None
    teacher_output = None if teacher is None else _run_teacher(teacher, batch, stage, device)

    def loss(out: Outputs) -> Tensor:
        if options.kind == "sigmoid":
            assert out.logit_bias is not None
            total = sigmoid_loss(out.image, out.text, out.logit_scale, out.logit_bias, keys=keys)
        else:
            targets = teacher_output if options.teacher_weight else None
            total = clip_loss(out.image, out.text, out.logit_scale, keys=keys, teacher=targets)
        if teacher_output is not None and options.teacher_features:
            assert out.image_for_teacher is not None and out.text_for_teacher is not None
            distance = feature_loss(out.image_for_teacher, teacher_output.image)
            distance = distance + feature_loss(out.text_for_teacher, teacher_output.text)
            total = total + options.teacher_features * distance / 2
        if text_targets is not None:
            assert out.target_texts is not None
            distance = feature_loss(out.target_texts, text_targets.targets.to(device))
            total = total + options.text_targets_weight * distance
        return total

    return loss


def _run_teacher(
    teacher: Embedder, batch: LocalBatch, stage: Stage, device: torch.device
) -> Teacher:
    """Embed the pairs with the teacher, from the images as prepared for the student."""
    assert batch.pixels is not None
    images = list(batch.pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    return Teacher(
        image=torch.from_numpy(teacher.embed_images(images)).to(device),
        text=torch.from_numpy(teacher.embed_texts([row.text for row in batch.rows])).to(device),
        logit_scale=teacher.logit_scale,
        weight=stage.loss.teacher_weight,
    )


def _hash_seed(*parts: int) -> int:
    name = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "big")


@contextmanager
def _gradient_sync(towers: nn.Module, last: bool) -> Iterator[None]:
    """Synchronise gradients between processes in the backward pass of the last chunk only."""
    if isinstance(towers, nn.parallel.DistributedDataParallel):
        with nullcontext() if last else towers.no_sync():
            yield
        return
    set_sync = getattr(towers.model, "set_requires_gradient_sync", None)  # FSDP2
    if set_sync is not None:
        set_sync(last)
    yield


@contextmanager
def _batch_norm_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of BatchNorm, which the second pass updates."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

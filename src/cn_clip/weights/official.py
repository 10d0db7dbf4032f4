"""The official names: what they tell about the model, and other spellings brought to them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cn_clip.config import (
    VISION_TOWERS,
    ModelConfig,
    TextConfig,
    VisionConfig,
    check_config,
)
from cn_clip.errors import CheckpointError
from cn_clip.weights.folder_config import named

_UNUSED = "bert.pooler."  # in files from the official training; the model has no pooler


def official_names(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors under their official names, and the names left out (BERT's pooler).

    Raises:
        CheckpointError: two names are the same without their prefixes, or fused attention weights
            cannot be parted.
    """
    plain = unfuse_attention(plain_names(tensors))
    dropped = tuple(name for name in plain if name.startswith(_UNUSED))
    return {name: t for name, t in plain.items() if name not in dropped}, dropped


# What wraps a model in training puts its own name before, or into, the names of the weights:
# DataParallel, DDP and DeepSpeed; torch.compile; FSDP and activation checkpointing; and, in front
# only, the attribute that a Lightning module or a script keeps the model in.
_WRAPPERS = re.compile(
    r"^(?:(?:model|clip|clip_model|net)\.)+(?=visual\.|bert\.|text_projection$|logit_scale$"
    r"|vision_model\.|text_model\.|visual_projection\.|text_projection\.)"
)
_WRAPPED = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without what training frameworks put into their names.

    Raises:
        CheckpointError: two names are the same without it.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = _WRAPPERS.sub("", _WRAPPED.sub("", str(name)))
        if short in plain:
            raise CheckpointError(
                f"the weights hold {short} twice, as {name!r} too; keep one model of the two"
            )
        plain[short] = tensor
    return plain


def unfuse_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the joint ``Wqkv`` weights that official training with flash-attention writes.

    Raises:
        CheckpointError: such a weight is not three in one.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith("attn.Wqkv"):
            plain[f"{stem.removesuffix('.Wqkv')}.in_proj_{kind}"] = tensor
        elif stem.endswith("attention.self.Wqkv"):
            if not tensor.ndim or not len(tensor) or len(tensor) % 3:
                raise CheckpointError(f"{name} {list(tensor.shape)} is not three weights in one")
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                plain[f"{stem.removesuffix('.Wqkv')}.{part}.{kind}"] = chunk
        elif stem.endswith("attention.self.out_proj"):
            plain[f"{stem.removesuffix('.self.out_proj')}.output.dense.{kind}"] = tensor
        else:
            plain[name] = tensor
    return plain


def resize_positions(positions: Tensor, length: int) -> Tensor:
    """Resize a ViT's position embeddings (1 + n*n, D) to another grid (``length`` = 1 + m*m, D).

    Bicubic with ``align_corners=True``, as the official training; the class token's stays.

    Raises:
        CheckpointError: one of the two grids is no square.
    """
    if positions.ndim and len(positions) == length:
        return positions
    old, new = math.isqrt(max(0, len(positions) - 1)), math.isqrt(length - 1)
    if positions.ndim != 2 or not old or old**2 != len(positions) - 1 or new**2 != length - 1:
        raise CheckpointError(
            f"position embeddings {list(positions.shape)} are no square grid that could be "
            f"resized to {length - 1} patches"
        )
    grid = positions[1:].float().T.reshape(1, -1, old, old)  # (1, D, n, n)
    grid = torch.nn.functional.interpolate(
        grid, size=(new, new), mode="bicubic", align_corners=True
    )
    return torch.cat([positions[:1], grid[0].flatten(1).T.to(positions.dtype)])


def infer_config(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> ModelConfig:
    """Tell from names and shapes which model the official weights ``tensors`` make.

    Raises:
        CheckpointError: they make none; ``path`` is named in the message.
    """
    try:
        vision, text = _infer_vision(tensors), _infer_text(tensors)
        embed_dim = tensors["text_projection"].shape[1]
    except KeyError as error:
        first = ", ".join(list(tensors)[:3]) or "nothing"
        raise CheckpointError(
            f"{path} is not a Chinese-CLIP checkpoint: it has no {error.args[0]} "
            f"(it begins with {first})"
        ) from None
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path} is not a Chinese-CLIP checkpoint: the shapes of its tensors make no model "
            f"({error})"
        ) from None
    config = ModelConfig(name="", embed_dim=embed_dim, vision=vision, text=text)
    check_config(config, str(path))
    return named(config)


def told_by_shapes(config: ModelConfig, state: Mapping[str, Tensor]) -> bool:
    """Whether ``infer_config`` would read this config off the weights."""
    try:
        told = infer_config(state, "the model")
    except CheckpointError:
        return False
    text = replace(told.text, dropout=config.text.dropout)  # matters in training only
    return replace(told, name=config.name, text=text) == config


def _infer_vision(tensors: Mapping[str, Tensor]) -> VisionConfig:
    conv = tensors["visual.conv1.weight"].shape
    if "visual.attnpool.positional_embedding" in tensors:
        grid = math.isqrt(tensors["visual.attnpool.positional_embedding"].shape[0] - 1)
        layers = tuple(_count(tensors, rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
        return VisionConfig("resnet", grid * 32, width=conv[0] * 2, layers=layers)
    width, patch = conv[0], conv[-1]
    grid = math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
    layers = (_count(tensors, r"visual\.transformer\.resblocks\.(\d+)\."),)
    # Head widths leave no trace in the shapes; 80 is ViT-H-14's, 64 all others'.
    head_width = VISION_TOWERS["ViT-H-14"].head_width if width == 1280 else 64
    return VisionConfig("vit", grid * patch, width, layers, patch, head_width)


def _infer_text(tensors: Mapping[str, Tensor]) -> TextConfig:
    vocab_size, hidden = tensors["bert.embeddings.word_embeddings.weight"].shape
    return TextConfig(
        hidden_size=hidden,
        layers=_count(tensors, r"bert\.encoder\.layer\.(\d+)\."),
        heads=max(1, hidden // 64),
        intermediate_size=tensors["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        vocab_size=vocab_size,
        max_positions=tensors["bert.embeddings.position_embeddings.weight"].shape[0],
        token_types=tensors["bert.embeddings.token_type_embeddings.weight"].shape[0],
    )


def _count(tensors: Iterable[str], pattern: str) -> int:
    found = (re.match(pattern, name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)

"""The official tensor names: other spellings renamed, and the config inferred from the shapes."""

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
from cn_clip.translation import _
from cn_clip.weights.folder_config import with_known_name

_UNUSED = "bert.pooler."  # in files of the official training; the model has no pooler


def official_names(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors under their official names, and the dropped names (BERT's pooler).

    Raises:
        CheckpointError: two names are equal without their prefixes, or fused attention weights
            cannot be split.
    """
    plain = unfuse_attention(plain_names(tensors))
    dropped = tuple(name for name in plain if name.startswith(_UNUSED))
    return {name: t for name, t in plain.items() if name not in dropped}, dropped


# Prefixes that training adds to weight names: at the start, the attribute of a Lightning module
# or script; anywhere, the wrappers of DataParallel, DDP and DeepSpeed, of torch.compile, of FSDP
# and of activation checkpointing.
_ATTRIBUTES = re.compile(
    r"^(?:(?:model|clip|clip_model|net)\.)+(?=visual\.|bert\.|text_projection$|logit_scale$"
    r"|vision_model\.|text_model\.|visual_projection\.|text_projection\.)"
)
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the prefixes that training frameworks add.

    Raises:
        CheckpointError: two names are equal without their prefixes.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = _ATTRIBUTES.sub("", _WRAPPERS.sub("", str(name)))
        if short in plain:
            raise CheckpointError(
                _(
                    "the weights have {short} twice, also as {name!r}; keep only one of the two "
                    "models",
                    short=short,
                    name=name,
                )
            )
        plain[short] = tensor
    return plain


def unfuse_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename or split the joint ``Wqkv`` weights of official training with flash-attention.

    Raises:
        CheckpointError: a joint weight cannot be split in three.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _unused, kind = name.rpartition(".")
        if stem.endswith("attn.Wqkv"):
            plain[f"{stem.removesuffix('.Wqkv')}.in_proj_{kind}"] = tensor
        elif stem.endswith("attention.self.Wqkv"):
            if not tensor.ndim or not len(tensor) or len(tensor) % 3:
                raise CheckpointError(
                    _(
                        "{name} {shape} cannot be split in three",
                        name=name,
                        shape=list(tensor.shape),
                    )
                )
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                plain[f"{stem.removesuffix('.Wqkv')}.{part}.{kind}"] = chunk
        elif stem.endswith("attention.self.out_proj"):
            plain[f"{stem.removesuffix('.self.out_proj')}.output.dense.{kind}"] = tensor
        else:
            plain[name] = tensor
    return plain


def resize_positions(positions: Tensor, length: int) -> Tensor:
    """Resize a ViT's position embeddings (1 + n*n, D) to another grid (``length`` = 1 + m*m, D).

    Bicubic with ``align_corners=True``, as in the official training. The class token's embedding
    is kept.

    Raises:
        CheckpointError: one of the grids is not square.
    """
    if positions.ndim and len(positions) == length:
        return positions
    old, new = math.isqrt(max(0, len(positions) - 1)), math.isqrt(length - 1)
    if positions.ndim != 2 or not old or old**2 != len(positions) - 1 or new**2 != length - 1:
        raise CheckpointError(
            _(
                "position embeddings {shape} are not a square grid and cannot be resized to "
                "{length} patches",
                shape=list(positions.shape),
                length=length - 1,
            )
        )
    grid = positions[1:].float().T.reshape(1, -1, old, old)  # (1, D, n, n)
    grid = torch.nn.functional.interpolate(
        grid, size=(new, new), mode="bicubic", align_corners=True
    )
    return torch.cat([positions[:1], grid[0].flatten(1).T.to(positions.dtype)])


def infer_config(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> ModelConfig:
    """Infer the config from the names and shapes of official weights.

    Raises:
        CheckpointError: the tensors are not a model's; the message names ``path``.
    """
    try:
        vision, text = _infer_vision(tensors), _infer_text(tensors)
        embed_dim = tensors["text_projection"].shape[1]
    except KeyError as error:
        first = ", ".join(list(tensors)[:3]) or _("nothing")
        raise CheckpointError(
            _(
                "{path} is not a Chinese-CLIP checkpoint: it has no {tensor} (it starts with "
                "{first})",
                path=path,
                tensor=error.args[0],
                first=first,
            )
        ) from None
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            _(
                "{path} is not a Chinese-CLIP checkpoint: the shapes of its tensors are those of "
                "no model ({error})",
                path=path,
                error=error,
            )
        ) from None
    config = ModelConfig(name="", embed_dim=embed_dim, vision=vision, text=text)
    check_config(config, str(path))
    return with_known_name(config)


def inferable_from_shapes(config: ModelConfig, state: Mapping[str, Tensor]) -> bool:
    """Whether ``infer_config`` would infer this config from the weights."""
    try:
        inferred = infer_config(state, _("the model"))
    except CheckpointError:
        return False
    text = replace(inferred.text, dropout=config.text.dropout)  # for training only
    return replace(inferred, name=config.name, text=text) == config


def _infer_vision(tensors: Mapping[str, Tensor]) -> VisionConfig:
    conv = tensors["visual.conv1.weight"].shape
    if "visual.attnpool.positional_embedding" in tensors:
        grid = math.isqrt(tensors["visual.attnpool.positional_embedding"].shape[0] - 1)
        layers = tuple(_count(tensors, rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
        return VisionConfig("resnet", grid * 32, width=conv[0] * 2, layers=layers)
    width, patch = conv[0], conv[-1]
    grid = math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
    layers = (_count(tensors, r"visual\.transformer\.resblocks\.(\d+)\."),)
    # Shapes do not show the head width: it is 80 for ViT-H-14 and 64 for all others.
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
    matches = (re.match(pattern, name) for name in tensors)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)

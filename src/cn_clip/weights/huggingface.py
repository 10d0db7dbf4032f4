"""Tensor names of Hugging Face's ``ChineseCLIPModel``, and of the image tower of ``CLIPModel``."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from cn_clip.errors import CheckpointError
from cn_clip.translation import _

_POSITION_IDS = ".embeddings.position_ids"  # a buffer, 0 to n, that older versions saved
_LINEAR = {"text_projection": "text_projection", "visual.proj": "visual_projection"}  # transposed
_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "bert.": "text_model.",
}
_BLOCK_NAMES = {
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def from_hugging_face(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors under their official names, and the dropped names; empties ``tensors``.

    Query, key and value weights are joined, projections are transposed.

    Raises:
        CheckpointError: the shapes of query, key and value weights do not match.
    """
    official: dict[str, Tensor] = {}
    dropped: list[str] = []
    for name in list(tensors):
        if name.endswith(_POSITION_IDS) or name.startswith("text_model.pooler."):
            dropped.append(name)
        elif joint := re.fullmatch(
            r"(vision_model\..*\.self_attn\.)[qkv]_proj\.(weight|bias)", name
        ):
            stem, kind = joint.groups()
            parts = [tensors.pop(f"{stem}{part}_proj.{kind}", None) for part in "qkv"]
            present = [part for part in parts if part is not None]
            if len(present) == 3:
                if len({part.shape[1:] for part in present}) > 1 or not present[0].ndim:
                    shapes = ", ".join(str(list(part.shape)) for part in present)
                    raise CheckpointError(
                        _(
                            "the shapes of {stem}[qkv]_proj.{kind} differ: {shapes}",
                            stem=stem,
                            kind=kind,
                            shapes=shapes,
                        )
                    )
                block = _renamed(stem.removesuffix(".self_attn."), _reversed(_NAMES))
                official[f"{block}.attn.in_proj_{kind}"] = torch.cat(present)
        elif name in tensors:
            new = _renamed(name, _reversed(_NAMES))
            new = _renamed(new, _reversed(_BLOCK_NAMES)) if new.startswith("visual.") else new
            tensor = tensors.pop(name)
            for ours, theirs in _LINEAR.items():
                if name == f"{theirs}.weight" and tensor.ndim == 2:
                    new, tensor = ours, tensor.T.contiguous()
            official[new] = tensor
    return official, tuple(dropped)


def to_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return official tensors under the names of ``ChineseCLIPModel``."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = _renamed(name, _NAMES)
        new = _renamed(new, _BLOCK_NAMES) if name.startswith("visual.") else new
        if name in _LINEAR:
            theirs[f"{_LINEAR[name]}.weight"] = tensor.T.contiguous()
        elif ".attn.in_proj_" in new:
            stem, kind = new.split(".attn.in_proj_")
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                theirs[f"{stem}.self_attn.{part}_proj.{kind}"] = chunk.clone()
        else:
            theirs[new] = tensor.contiguous()
    return theirs


def _reversed(names: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if old in name and (name.startswith(old) or old.startswith(".")):
            return name.replace(old, new, 1)
    return name

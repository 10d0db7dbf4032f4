"""Hugging Face's names and configs for the same models: ``ChineseCLIPModel``, and ``CLIPModel``'s
image tower, which is spelled alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cn_clip.config import CLIP_MEAN, CLIP_STD, ModelConfig, TextConfig, VisionConfig, check_config
from cn_clip.errors import CheckpointError

_POSITION_IDS = ".embeddings.position_ids"  # a buffer, 0 to n: older versions stored it
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
    """Return the tensors under their official names, and the names left out; empties ``tensors``.

    Queries, keys and values become one matrix, projections are transposed.

    Raises:
        CheckpointError: the shapes of queries, keys and values do not fit together.
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
                    raise CheckpointError(f"{stem}[qkv]_proj.{kind} do not fit together: {shapes}")
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
    """Return official tensors under the names that ``ChineseCLIPModel`` gives them."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = _renamed(name, _NAMES)
        new = _renamed(new, _BLOCK_NAMES) if name.startswith("visual.") else new
        if name in _LINEAR:
            theirs[f"{_LINEAR[name]}.weight"] = tensor.T.contiguous()
        elif ".attn.in_proj_" in new:
            stem, kind = new.split(".attn.in_proj_")
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                theirs[f"{stem}.self_attn.{part}_proj.{kind}"] = third.clone()
        else:
            theirs[new] = tensor.contiguous()
    return theirs


def config_from(
    values: Mapping[str, Any], preparation: Mapping[str, Any] | None, where: str
) -> ModelConfig:
    """Return the config of a ``ChineseCLIPModel`` from its ``config.json``.

    Args:
        values: what ``config.json`` holds.
        preparation: what ``preprocessor_config.json`` holds, if there is one.
        where: the folder, for messages.

    Raises:
        CheckpointError: it is another architecture (named), or a variant that ours is not.
    """
    kind = values.get("model_type")
    if kind != "chinese_clip":
        raise CheckpointError(
            f"{where} holds a Hugging Face model of type {kind!r}, not 'chinese_clip'; a CLIP or "
            "BERT serves as initial weights only: clip.load(model, clip_path=..., bert_path=...)"
        )
    vision = _VISION_DEFAULTS | _object(values, "vision_config", where)
    text = _TEXT_DEFAULTS | _object(values, "text_config", where)
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        for part, given in (("vision_config", vision), ("text_config", text)):
            if type(given[key]) is not int or given[key] < 1:
                raise CheckpointError(
                    f"{where}: {part}.{key} = {given[key]!r} is an impossible value; it must be "
                    "a count"
                )
    fixed = {
        "vision_config.hidden_act": (vision["hidden_act"], "quick_gelu"),
        "vision_config.layer_norm_eps": (vision["layer_norm_eps"], 1e-5),
        "vision_config.intermediate_size": (
            vision["intermediate_size"],
            4 * vision["hidden_size"],
        ),
        "text_config.hidden_act": (text["hidden_act"], "gelu"),
        "text_config.layer_norm_eps": (text["layer_norm_eps"], 1e-12),
    }
    for key, (given, ours) in fixed.items():
        if given != ours:
            raise CheckpointError(
                f"{where}: {key} = {given!r} is a variant of Chinese-CLIP that cannot be run "
                f"here; it must be {ours!r}"
            )
    if not isinstance(preparation := preparation or {}, Mapping):
        raise CheckpointError(f"{where}: preprocessor_config.json holds no object")
    config = ModelConfig(
        name="",
        embed_dim=values.get("projection_dim", 512),
        vision=VisionConfig(
            "vit",
            vision["image_size"],
            vision["hidden_size"],
            (vision["num_hidden_layers"],),
            vision["patch_size"],
            vision["hidden_size"] // vision["num_attention_heads"],
        ),
        text=TextConfig(
            text["hidden_size"],
            text["num_hidden_layers"],
            text["num_attention_heads"],
            text["intermediate_size"],
            text["vocab_size"],
            text["max_position_embeddings"],
            text["type_vocab_size"],
            text["hidden_dropout_prob"],
        ),
        image_mean=_three(preparation.get("image_mean", CLIP_MEAN)),
        image_std=_three(preparation.get("image_std", CLIP_STD)),
    )
    check_config(config, where)
    return config


def config_to(config: ModelConfig, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Return the JSON files of a ``ChineseCLIPModel`` folder by their names.

    Raises:
        CheckpointError: the format has no place for the model: only ViT image towers, on pixels
            without a background.
    """
    vision, text = config.vision, config.text
    if vision.kind != "vit" or config.background is not None:
        raise CheckpointError(
            f"{config.name} cannot be written as a Hugging Face ChineseCLIPModel: that format has "
            f"a place for ViT image towers only, not for {vision.kind}; write --to safetensors"
            f"{' or official' if vision.kind == 'resnet' else ''} instead"
        )
    side = {"height": vision.resolution, "width": vision.resolution}
    return {
        "config.json": {
            "architectures": ["ChineseCLIPModel"],
            "model_type": "chinese_clip",
            "projection_dim": config.embed_dim,
            "logit_scale_init_value": 2.6592,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "vision_config": _VISION_DEFAULTS
            | {
                "model_type": "chinese_clip_vision_model",
                "hidden_size": vision.width,
                "intermediate_size": 4 * vision.width,
                "num_hidden_layers": vision.layers[0],
                "num_attention_heads": vision.width // vision.head_width,
                "image_size": vision.resolution,
                "patch_size": vision.patch_size,
                "projection_dim": config.embed_dim,
            },
            "text_config": _TEXT_DEFAULTS
            | {
                "model_type": "chinese_clip_text_model",
                "hidden_size": text.hidden_size,
                "intermediate_size": text.intermediate_size,
                "num_hidden_layers": text.layers,
                "num_attention_heads": text.heads,
                "vocab_size": text.vocab_size,
                "max_position_embeddings": text.max_positions,
                "type_vocab_size": text.token_types,
                "hidden_dropout_prob": text.dropout,
                "attention_probs_dropout_prob": text.dropout,
                "pad_token_id": 0,
            },
        },
        "preprocessor_config.json": {
            "image_processor_type": "ChineseCLIPImageProcessor",
            "do_resize": True,
            "size": side,
            "resample": 3,
            "do_center_crop": False,
            "do_convert_rgb": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(config.image_mean),
            "image_std": list(config.image_std),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "model_max_length": config.context_length,
        },
    }


# What a config.json leaves out has these values, which are transformers' own.
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def _object(values: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    inner = values.get(key) or {}
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"{where}: {key} is {type(inner).__name__}, not an object")
    return dict(inner)


def _three(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else values


def _reversed(names: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if old in name and (name.startswith(old) or old.startswith(".")):
            return name.replace(old, new, 1)
    return name

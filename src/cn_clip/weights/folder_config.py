"""Configs of model folders, ours and Hugging Face's; this module does not import torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cn_clip.config import (
    CLIP_MEAN,
    CLIP_STD,
    EMBED_DIMS,
    MODELS,
    TEXT_TOWERS,
    VISION_TOWERS,
    ModelConfig,
    TextConfig,
    VisionConfig,
    check_config,
    read_config_json,
)
from cn_clip.errors import CheckpointError, MissingWeightsError
from cn_clip.translation import _

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")

# Defaults of transformers, for keys that a config.json omits.
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


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Read the ``config.json`` of our folder, or of a ``ChineseCLIPModel``.

    Raises:
        MissingWeightsError: the folder has no ``config.json``.
        CheckpointError: the config is damaged, or of another architecture.
    """
    return read_config_format(Path(folder))[0]


def read_config_format(folder: Path) -> tuple[ModelConfig, bool]:
    """Return a folder's config, and whether it has Hugging Face's format."""
    if not os.path.isfile(folder / CONFIG):
        raise MissingWeightsError(
            _(
                "the folder {folder} has no {config}; a model folder has {config} and "
                "{weights}{suggestion}",
                folder=folder,
                config=CONFIG,
                weights=WEIGHTS,
                suggestion=suggest_weights(folder),
            )
        )
    values = read_config_json(folder / CONFIG)
    if not isinstance(values, dict) or "model_type" not in values:
        return ModelConfig.from_dict(values), False
    path = folder / "preprocessor_config.json"
    preprocessor = read_config_json(path) if os.path.isfile(path) else None
    return with_known_name(config_from_hugging_face(values, preprocessor, str(folder))), True


def config_from_hugging_face(
    values: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, where: str
) -> ModelConfig:
    """Return the config of a ``ChineseCLIPModel`` from its ``config.json``.

    Args:
        values: content of ``config.json``.
        preprocessor: content of ``preprocessor_config.json``, None without one.
        where: the folder, for messages.

    Raises:
        CheckpointError: it is another architecture, or an unsupported variant.
    """
    model_type = values.get("model_type")
    if model_type != "chinese_clip":
        raise CheckpointError(
            _(
                "{where} has a Hugging Face model of type {model_type!r}, not 'chinese_clip'; a "
                "CLIP or BERT can only be initial weights: clip.load(model, clip_path=..., "
                "bert_path=...)",
                where=where,
                model_type=model_type,
            )
        )
    vision = _VISION_DEFAULTS | _object(values, "vision_config", where)
    text = _TEXT_DEFAULTS | _object(values, "text_config", where)
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        for part, tower in (("vision_config", vision), ("text_config", text)):
            if type(tower[key]) is not int or tower[key] < 1:
                raise CheckpointError(
                    _(
                        "{where}: {part}.{key} = {value!r} is an impossible value; it must be a "
                        "positive integer",
                        where=where,
                        part=part,
                        key=key,
                        value=tower[key],
                    )
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
    for key, (value, supported) in fixed.items():
        if value != supported:
            raise CheckpointError(
                _(
                    "{where}: {key} = {value!r} is an unsupported variant of Chinese-CLIP; it "
                    "must be {supported!r}",
                    where=where,
                    key=key,
                    value=value,
                    supported=supported,
                )
            )
    if not isinstance(preprocessor := preprocessor or {}, Mapping):
        raise CheckpointError(_("{where}: preprocessor_config.json is not an object", where=where))
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
        image_mean=_as_tuple(preprocessor.get("image_mean", CLIP_MEAN)),
        image_std=_as_tuple(preprocessor.get("image_std", CLIP_STD)),
    )
    check_config(config, where)
    return config


def config_to_hugging_face(config: ModelConfig, dtype: str) -> dict[str, dict[str, Any]]:
    """Return the JSON files of a ``ChineseCLIPModel`` folder, by file name.

    Raises:
        CheckpointError: the format cannot represent the model: it supports only ViT image towers
            without a background colour.
    """
    vision, text = config.vision, config.text
    if vision.kind != "vit" or config.background is not None:
        raise CheckpointError(
            _(
                "{name} cannot be written as a Hugging Face ChineseCLIPModel: that format "
                "supports only ViT image towers, not {kind}; write --to safetensors{alternative} "
                "instead",
                name=config.name,
                kind=vision.kind,
                alternative=_(" or official") if vision.kind == "resnet" else "",
            )
        )
    return {
        "config.json": {
            "architectures": ["ChineseCLIPModel"],
            "model_type": "chinese_clip",
            "projection_dim": config.embed_dim,
            "logit_scale_init_value": 2.6592,
            "torch_dtype": dtype,
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
        "preprocessor_config.json": preprocessor_config(config),
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "model_max_length": config.context_length,
        },
    }


def preprocessor_config(config: ModelConfig) -> dict[str, Any]:
    """Return the ``preprocessor_config.json`` of a model, for transformers and transformers.js.

    It cannot represent a background colour: transparent images are prepared differently there.
    """
    return {
        # transformers.js knows the class by this name only, transformers by both names.
        "feature_extractor_type": "ChineseCLIPFeatureExtractor",
        "processor_class": "ChineseCLIPProcessor",
        "do_resize": True,
        "size": {"height": config.vision.resolution, "width": config.vision.resolution},
        "resample": 3,
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }


def with_known_name(config: ModelConfig) -> ModelConfig:
    """Return the config with the name of the known model or towers that it matches."""
    for name, known in MODELS.items():
        if replace(config, name=name) == known:
            return known
    vision = next((n for n, tower in VISION_TOWERS.items() if tower == config.vision), None)
    text = next((n for n, tower in TEXT_TOWERS.items() if tower == config.text), None)
    if vision and text and EMBED_DIMS[vision] == config.embed_dim:
        return replace(config, name=f"{vision}@{text}")
    shape = config.vision
    vision = vision or f"{shape.kind}-{shape.width}x{'-'.join(map(str, shape.layers))}"
    text = text or f"bert-{config.text.hidden_size}x{config.text.layers}"
    return replace(config, name=f"{vision}@{text}")


def suggest_weights(folder: Path) -> str:
    """Return the end of a message: the file or folder in ``folder`` to give instead."""
    if os.path.isfile(folder / "latest"):
        return _("; DeepSpeed wrote it: give the mp_rank_00_model_states.pt in its subfolder")
    try:
        entries = sorted(os.listdir(folder))
    except (OSError, ValueError):  # not a readable folder, or not a valid name
        return ""
    if "recipe.toml" in entries and os.path.isfile(folder / "final" / CONFIG):
        return _("; it is a training run: give {final}, its result", final=folder / "final")
    models = [n for n in entries if n.endswith(_SUFFIXES) or os.path.isfile(folder / n / CONFIG)]
    return _("; give one of these in it: {models}", models=", ".join(models[:3])) if models else ""


def _object(values: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    inner = values.get(key) or {}
    if not isinstance(inner, Mapping):
        raise CheckpointError(
            _(
                "{where}: {key} is {inner_type}, not an object",
                where=where,
                key=key,
                inner_type=type(inner).__name__,
            )
        )
    return dict(inner)


def _as_tuple(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else values

"""The config of a model folder, ours or Hugging Face's; reading it needs no torch."""

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
    read_json,
)
from cn_clip.errors import CheckpointError, MissingWeightsError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")

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
        MissingWeightsError: there is none.
        CheckpointError: it is damaged, or of another architecture.
    """
    return read_config_format(Path(folder))[0]


def read_config_format(folder: Path) -> tuple[ModelConfig, bool]:
    """Return a folder's config, and whether it is written as Hugging Face writes it."""
    if not os.path.isfile(folder / CONFIG):
        raise MissingWeightsError(
            f"the folder {folder} has no {CONFIG}; a model folder holds {CONFIG} and {WEIGHTS}"
            f"{weights_in(folder)}"
        )
    values = read_json(folder / CONFIG)
    if not isinstance(values, dict) or "model_type" not in values:
        return ModelConfig.from_dict(values), False
    preparation = folder / "preprocessor_config.json"
    prepared = read_json(preparation) if os.path.isfile(preparation) else None
    return named(config_from(values, prepared, str(folder))), True


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


def config_to(config: ModelConfig, dtype: str) -> dict[str, dict[str, Any]]:
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
def named(config: ModelConfig) -> ModelConfig:
    """Give a config the name of the model that it is, or of its towers."""
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


def weights_in(folder: Path) -> str:
    """Say which file or folder in a folder to give instead of it."""
    if os.path.isfile(folder / "latest"):
        return "; it is DeepSpeed's: give the mp_rank_00_model_states.pt in the folder inside"
    try:
        inside = sorted(os.listdir(folder))
    except (OSError, ValueError):  # none that can be listed, or a name that none can have
        return ""
    models = [n for n in inside if n.endswith(_SUFFIXES) or os.path.isfile(folder / n / CONFIG)]
    return f"; give one of these in it: {', '.join(models[:3])}" if models else ""


def _object(values: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    inner = values.get(key) or {}
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"{where}: {key} is {type(inner).__name__}, not an object")
    return dict(inner)


def _three(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else values

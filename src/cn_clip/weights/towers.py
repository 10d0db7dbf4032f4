"""Initial weights of one tower, out of the files in which CLIP and BERT are published.

Image towers: OpenAI's CLIP, Hugging Face's ``CLIPModel``, open_clip, and our own formats. Text
towers: BERT, RoBERTa-wwm-ext and RBT3 of Hugging Face, and our own. What belongs to the other
tower or to a task of pre-training is left out by name; anything else unknown is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cn_clip.config import read_json
from cn_clip.errors import CheckpointError, MissingWeightsError
from cn_clip.weights.huggingface import from_hugging_face
from cn_clip.weights.official import plain_names, unfuse_attention
from cn_clip.weights.tensorfile import read_tensors

FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)

_NO_IMAGE_TOWER = re.compile(  # of a CLIP: its text side, and scalars that describe it
    r"(transformer|text|text_model|text_projection|token_embedding|ln_final|bert)\b"
    r"|positional_embedding$|attn_mask$|logit_bias$|input_resolution$|context_length$|vocab_size$"
)
_NO_TEXT_TOWER = re.compile(  # heads of a BERT for pre-training, and a CLIP's image side
    r"(bert\.)?((pooler|cls)\.|embeddings\.position_ids$)"
    r"|visual\b|text_projection$|logit_scale$"
)


@dataclass(frozen=True, slots=True)
class Tower:
    """The tensors of one tower under official names, and the names in the file left out."""

    tensors: dict[str, Tensor]
    dropped: tuple[str, ...]


def image_tower(path: str | os.PathLike[str]) -> Tower:
    """Read ``visual.*``, and ``logit_scale`` if there is one.

    Raises:
        MissingWeightsError: there is no such file.
        CheckpointError: it holds no image tower of CLIP, or a variant that ours is not.
    """
    file = weights_file(path)
    _check_activation(Path(path))
    tensors = _unwrapped(read_tensors(file))
    dropped: tuple[str, ...] = ()
    if any(name.startswith("vision_model.") for name in tensors):
        tensors, dropped = from_hugging_face(tensors)
    return _tower(tensors, "visual.", _NO_IMAGE_TOWER, dropped, file, extra="logit_scale")


def text_tower(path: str | os.PathLike[str]) -> Tower:
    """Read ``bert.*``.

    Raises:
        MissingWeightsError: there is no such file.
        CheckpointError: it holds no BERT.
    """
    file = weights_file(path)
    given = _unwrapped(read_tensors(file))
    dropped: tuple[str, ...] = ()
    if any(name.startswith("text_model.encoder.layer.") for name in given):
        given, dropped = from_hugging_face(given)
    tensors = {}
    for name, tensor in given.items():
        plain = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        plain = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", plain)
        plain = plain.removeprefix("bert.")
        ours = plain.startswith(("embeddings.", "encoder.", "pooler."))
        tensors[f"bert.{plain}" if ours else plain] = tensor
    return _tower(tensors, "bert.", _NO_TEXT_TOWER, dropped, file)


def weights_file(path: str | os.PathLike[str]) -> Path:
    """Return the file of weights at ``path``, which may be the folder that holds it."""
    path = Path(path)
    if not os.path.isdir(path):
        return path
    for name in FILES:
        if os.path.isfile(path / name):
            return path / name
    raise MissingWeightsError(
        f"the folder {path} holds no weights; expected one of {', '.join(FILES)}"
    )


def _tower(
    tensors: Mapping[str, Tensor],
    prefix: str,
    left_out: re.Pattern[str],
    dropped: tuple[str, ...],
    file: Path,
    extra: str = "",
) -> Tower:
    kept, out, strange = {}, list(dropped), []
    for name, tensor in tensors.items():
        if left_out.match(name):
            out.append(name)
        elif name.startswith(prefix) or name == extra:
            kept[name] = tensor
        else:
            strange.append(name)
    what = {"visual.": "image tower of a CLIP", "bert.": "BERT"}[prefix]
    if not any(name.startswith(prefix) for name in kept):
        first = ", ".join(list(tensors)[:3])
        raise CheckpointError(f"{file} holds no {what}; it begins with {first}")
    if strange:
        raise CheckpointError(
            f"{file} is no {what} known here: it also holds {strange[0]}"
            + (f" and {len(strange) - 1} more unknown tensors" if len(strange) > 1 else "")
        )
    return Tower(kept, tuple(out))


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return unfuse_attention(plain_names(tensors))


def _check_activation(folder: Path) -> None:
    """Refuse towers trained with another activation: shapes do not tell, only a config does."""
    if not os.path.isdir(folder):
        return
    for name in ("config.json", "open_clip_config.json"):
        try:
            values = read_json(folder / name)
            vision = values.get("vision_config")
            if name == "config.json" and isinstance(vision, dict):
                activation = vision.get("hidden_act", "quick_gelu")
            elif name == "open_clip_config.json":
                quick = values.get("model_cfg", {}).get("quick_gelu", False)
                activation = "quick_gelu" if quick else "gelu"
            else:
                continue
        except (CheckpointError, AttributeError):
            continue
        if activation != "quick_gelu":
            raise CheckpointError(
                f"{folder / name} says that its image tower was trained with {activation}; the ViT "
                "here computes quick_gelu, so its features would be wrong. Take a quick_gelu one"
            )

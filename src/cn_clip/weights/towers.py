"""Initial weights of one tower, from published files of CLIP and BERT.

Image towers: OpenAI's CLIP, Hugging Face's ``CLIPModel``, open_clip, and our formats. Text towers:
BERT, RoBERTa-wwm-ext and RBT3 of Hugging Face, and our formats. The other tower and the heads of
pre-training are dropped by name; other unknown names are errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cn_clip.config import read_config_json
from cn_clip.errors import CheckpointError, MissingWeightsError
from cn_clip.translation import _
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

_NOT_IMAGE_TOWER = re.compile(  # the text tower of a CLIP, and its metadata
    r"(transformer|text|text_model|text_projection|token_embedding|ln_final|bert)\b"
    r"|positional_embedding$|attn_mask$|logit_bias$|input_resolution$|context_length$|vocab_size$"
)
_NOT_TEXT_TOWER = re.compile(  # pre-training heads of a BERT, and the image tower of a CLIP
    r"(bert\.)?((pooler|cls)\.|embeddings\.position_ids$)"
    r"|visual\b|text_projection$|logit_scale$"
)


@dataclass(frozen=True, slots=True)
class Tower:
    """The tensors of one tower under official names, and the dropped names of the file."""

    tensors: dict[str, Tensor]
    dropped: tuple[str, ...]


def image_tower(path: str | os.PathLike[str]) -> Tower:
    """Read ``visual.*``, and ``logit_scale`` if the file has it.

    Raises:
        MissingWeightsError: the file does not exist.
        CheckpointError: the file has no image tower of a CLIP, or an unsupported variant.
    """
    file = find_weights_file(path)
    _check_activation(Path(path))
    tensors = _unwrapped(read_tensors(file))
    dropped: tuple[str, ...] = ()
    if any(name.startswith("vision_model.") for name in tensors):
        tensors, dropped = from_hugging_face(tensors)
    return _tower(tensors, "visual.", _NOT_IMAGE_TOWER, dropped, file, extra="logit_scale")


def text_tower(path: str | os.PathLike[str]) -> Tower:
    """Read ``bert.*``.

    Raises:
        MissingWeightsError: the file does not exist.
        CheckpointError: the file has no BERT.
    """
    file = find_weights_file(path)
    file_tensors = _unwrapped(read_tensors(file))
    dropped: tuple[str, ...] = ()
    if any(name.startswith("text_model.encoder.layer.") for name in file_tensors):
        file_tensors, dropped = from_hugging_face(file_tensors)
    tensors = {}
    for name, tensor in file_tensors.items():
        plain = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        plain = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", plain)
        plain = plain.removeprefix("bert.")
        ours = plain.startswith(("embeddings.", "encoder.", "pooler."))
        tensors[f"bert.{plain}" if ours else plain] = tensor
    return _tower(tensors, "bert.", _NOT_TEXT_TOWER, dropped, file)


def find_weights_file(path: str | os.PathLike[str]) -> Path:
    """Return the weights file at ``path``, a file or its folder."""
    path = Path(path)
    if not os.path.isdir(path):
        return path
    for name in FILES:
        if os.path.isfile(path / name):
            return path / name
    raise MissingWeightsError(
        _(
            "the folder {path} has no weights; expected one of {files}",
            path=path,
            files=", ".join(FILES),
        )
    )


def _tower(
    tensors: Mapping[str, Tensor],
    prefix: str,
    not_in_tower: re.Pattern[str],
    dropped: tuple[str, ...],
    file: Path,
    extra: str = "",
) -> Tower:
    kept, all_dropped, unknown = {}, list(dropped), []
    for name, tensor in tensors.items():
        if not_in_tower.match(name):
            all_dropped.append(name)
        elif name.startswith(prefix) or name == extra:
            kept[name] = tensor
        else:
            unknown.append(name)
    tower = {"visual.": _("image tower of a CLIP"), "bert.": "BERT"}[prefix]
    if not any(name.startswith(prefix) for name in kept):
        first = ", ".join(list(tensors)[:3])
        raise CheckpointError(
            _("{file} has no {tower}; it starts with {first}", file=file, tower=tower, first=first)
        )
    if unknown:
        raise CheckpointError(
            _(
                "{file} is not a known {tower}: it also has {unknown}",
                file=file,
                tower=tower,
                unknown=unknown[0],
            )
            + (
                _(" and {count} more unknown tensors", count=len(unknown) - 1)
                if len(unknown) > 1
                else ""
            )
        )
    return Tower(kept, tuple(all_dropped))


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return unfuse_attention(plain_names(tensors))


def _check_activation(folder: Path) -> None:
    """Refuse towers of another activation, which only a config shows."""
    if not os.path.isdir(folder):
        return
    for name in ("config.json", "open_clip_config.json"):
        try:
            values = read_config_json(folder / name)
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
                _(
                    "{folder}: the image tower was trained with {activation}, and the ViT here "
                    "computes quick_gelu, so features would be wrong; use a quick_gelu model",
                    folder=folder / name,
                    activation=activation,
                )
            )

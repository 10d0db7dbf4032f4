"""Weights in and out, to and from the model: official ``.pt`` files, Hugging Face folders, ours.

``checkpoint`` reads and writes whole models, ``tensorfile`` reads any file's tensors, ``official``
and ``huggingface`` know the names and configs of a format, ``towers`` finds the initial weights of
one tower in files of CLIP or BERT.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cn_clip.weights.checkpoint import (
        Checkpoint,
        add_to_digest,
        build,
        check_fit,
        check_model,
        check_own,
        explained,
        read,
        save_folder,
        save_hugging_face,
        save_official,
        save_state,
        write_folder,
        write_hugging_face,
        write_official,
    )
    from cn_clip.weights.folder_config import (
        read_config,
    )
    from cn_clip.weights.official import (
        infer_config,
        official_names,
        resize_positions,
        unfuse_attention,
    )
    from cn_clip.weights.tensorfile import (
        other_parts,
        read_tensors,
        state_dict_in,
    )
    from cn_clip.weights.towers import (
        Tower,
        image_tower,
        text_tower,
    )

__all__ = [
    "Checkpoint",
    "Tower",
    "add_to_digest",
    "build",
    "check_fit",
    "check_model",
    "check_own",
    "explained",
    "image_tower",
    "infer_config",
    "official_names",
    "other_parts",
    "read",
    "read_config",
    "read_tensors",
    "resize_positions",
    "save_folder",
    "save_hugging_face",
    "save_official",
    "save_state",
    "state_dict_in",
    "text_tower",
    "unfuse_attention",
    "write_folder",
    "write_hugging_face",
    "write_official",
]

# In this order: a config is read without torch, which the others load.
_MODULES = ("folder_config", "checkpoint", "official", "tensorfile", "towers")


def __getattr__(name: str) -> object:
    for module in _MODULES if name in __all__ else ():
        value: object = vars(import_module(f"cn_clip.weights.{module}")).get(name)
        if value is not None:
            return value
    raise AttributeError(f"module 'cn_clip.weights' has no attribute {name!r}")

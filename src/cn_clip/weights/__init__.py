"""Reading and writing weights: official ``.pt`` files, Hugging Face folders and our folders.

``checkpoint`` reads and writes whole models, ``tensorfile`` reads the tensors of any file,
``official`` and ``huggingface`` convert the names and configs of a format, and ``towers`` reads
the initial weights of one tower from CLIP or BERT files.
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
        describe_write_errors,
        read,
        refuse_foreign_folder,
        save_folder,
        save_hugging_face,
        save_official,
        save_weights,
        tensor_bytes,
        write_folder,
        write_hugging_face,
        write_official_checkpoint,
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
        other_checkpoint_keys,
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
    "describe_write_errors",
    "image_tower",
    "infer_config",
    "official_names",
    "other_checkpoint_keys",
    "read",
    "read_config",
    "read_tensors",
    "refuse_foreign_folder",
    "resize_positions",
    "save_folder",
    "save_hugging_face",
    "save_official",
    "save_weights",
    "state_dict_in",
    "tensor_bytes",
    "text_tower",
    "unfuse_attention",
    "write_folder",
    "write_hugging_face",
    "write_official_checkpoint",
]

# Searched in this order on first use: reading a config needs no torch, the others import it.
_MODULES = ("folder_config", "checkpoint", "official", "tensorfile", "towers")


def __getattr__(name: str) -> object:
    for module in _MODULES if name in __all__ else ():
        value: object = vars(import_module(f"cn_clip.weights.{module}")).get(name)
        if value is not None:
            return value
    raise AttributeError(f"module 'cn_clip.weights' has no attribute {name!r}")

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
        Checkpoint as Checkpoint,
    )
    from cn_clip.weights.checkpoint import (
        add_to_digest as add_to_digest,
    )
    from cn_clip.weights.checkpoint import (
        build as build,
    )
    from cn_clip.weights.checkpoint import (
        check_fit as check_fit,
    )
    from cn_clip.weights.checkpoint import (
        check_model as check_model,
    )
    from cn_clip.weights.checkpoint import (
        describe_write_errors as describe_write_errors,
    )
    from cn_clip.weights.checkpoint import (
        read as read,
    )
    from cn_clip.weights.checkpoint import (
        refuse_foreign_folder as refuse_foreign_folder,
    )
    from cn_clip.weights.checkpoint import (
        save_folder as save_folder,
    )
    from cn_clip.weights.checkpoint import (
        save_hugging_face as save_hugging_face,
    )
    from cn_clip.weights.checkpoint import (
        save_official as save_official,
    )
    from cn_clip.weights.checkpoint import (
        save_weights as save_weights,
    )
    from cn_clip.weights.checkpoint import (
        write_folder as write_folder,
    )
    from cn_clip.weights.checkpoint import (
        write_hugging_face as write_hugging_face,
    )
    from cn_clip.weights.checkpoint import (
        write_official_checkpoint as write_official_checkpoint,
    )
    from cn_clip.weights.folder_config import read_config as read_config
    from cn_clip.weights.official import (
        infer_config as infer_config,
    )
    from cn_clip.weights.official import (
        official_names as official_names,
    )
    from cn_clip.weights.official import (
        resize_positions as resize_positions,
    )
    from cn_clip.weights.official import (
        unfuse_attention as unfuse_attention,
    )
    from cn_clip.weights.tensorfile import (
        other_checkpoint_keys as other_checkpoint_keys,
    )
    from cn_clip.weights.tensorfile import (
        read_tensors as read_tensors,
    )
    from cn_clip.weights.tensorfile import (
        state_dict_in as state_dict_in,
    )
    from cn_clip.weights.towers import (
        Tower as Tower,
    )
    from cn_clip.weights.towers import (
        image_tower as image_tower,
    )
    from cn_clip.weights.towers import (
        text_tower as text_tower,
    )

# Imported on first use, because they import torch; reading a config does not need it.
_MODULES = {
    "Checkpoint": "checkpoint",
    "Tower": "towers",
    "add_to_digest": "checkpoint",
    "build": "checkpoint",
    "check_fit": "checkpoint",
    "check_model": "checkpoint",
    "refuse_foreign_folder": "checkpoint",
    "describe_write_errors": "checkpoint",
    "image_tower": "towers",
    "infer_config": "official",
    "official_names": "official",
    "other_checkpoint_keys": "tensorfile",
    "read": "checkpoint",
    "read_config": "folder_config",
    "read_tensors": "tensorfile",
    "resize_positions": "official",
    "save_folder": "checkpoint",
    "save_hugging_face": "checkpoint",
    "save_official": "checkpoint",
    "save_weights": "checkpoint",
    "state_dict_in": "tensorfile",
    "text_tower": "towers",
    "unfuse_attention": "official",
    "write_folder": "checkpoint",
    "write_hugging_face": "checkpoint",
    "write_official_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'cn_clip.weights' has no attribute {name!r}")
    value: object = getattr(import_module(f"cn_clip.weights.{_MODULES[name]}"), name)
    return value

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
        check_own as check_own,
    )
    from cn_clip.weights.checkpoint import (
        explained as explained,
    )
    from cn_clip.weights.checkpoint import (
        read as read,
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
        save_state as save_state,
    )
    from cn_clip.weights.checkpoint import (
        write_folder as write_folder,
    )
    from cn_clip.weights.checkpoint import (
        write_hugging_face as write_hugging_face,
    )
    from cn_clip.weights.checkpoint import (
        write_official as write_official,
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
        other_parts as other_parts,
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

# Found on first use, since they load torch: a config is read without it.
_HOMES = {
    "Checkpoint": "checkpoint",
    "Tower": "towers",
    "add_to_digest": "checkpoint",
    "build": "checkpoint",
    "check_fit": "checkpoint",
    "check_model": "checkpoint",
    "check_own": "checkpoint",
    "explained": "checkpoint",
    "image_tower": "towers",
    "infer_config": "official",
    "official_names": "official",
    "other_parts": "tensorfile",
    "read": "checkpoint",
    "read_config": "folder_config",
    "read_tensors": "tensorfile",
    "resize_positions": "official",
    "save_folder": "checkpoint",
    "save_hugging_face": "checkpoint",
    "save_official": "checkpoint",
    "save_state": "checkpoint",
    "state_dict_in": "tensorfile",
    "text_tower": "towers",
    "unfuse_attention": "official",
    "write_folder": "checkpoint",
    "write_hugging_face": "checkpoint",
    "write_official": "checkpoint",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'cn_clip.weights' has no attribute {name!r}")
    value: object = getattr(import_module(f"cn_clip.weights.{_HOMES[name]}"), name)
    return value

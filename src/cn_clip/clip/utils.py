"""Where the official package keeps the same functions, for scripts that import them from here."""

from cn_clip.clip import (
    available_models,
    create_model,
    image_transform,
    load,
    load_from_name,
    tokenize,
)

__all__ = [
    "available_models",
    "create_model",
    "image_transform",
    "load",
    "load_from_name",
    "tokenize",
]

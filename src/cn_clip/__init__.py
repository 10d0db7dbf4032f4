"""Image and Chinese text embeddings in one space.

>>> import cn_clip
>>> embedder = cn_clip.load()  # the embedded model, no download
>>> result = cn_clip.classify(embedder, ["cat.jpg"], ["猫", "狗"])
>>> result.top(1)

``cn_clip.clip`` has the functions of the official package.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from cn_clip.successors import Successors

__version__ = "2.0.0.dev0"

__all__ = [
    "CNClipError",
    "CheckpointError",
    "Classification",
    "Embedder",
    "ImageError",
    "MissingWeightsError",
    "UnknownModelError",
    "UsageError",
    "__version__",
    "classify",
    "embeddings",
    "find_images",
    "load",
]

if TYPE_CHECKING:
    from cn_clip import embeddings
    from cn_clip.embedder import Embedder, load
    from cn_clip.errors import (
        CheckpointError,
        CNClipError,
        ImageError,
        MissingWeightsError,
        UnknownModelError,
        UsageError,
    )
    from cn_clip.image.decode import find_images
    from cn_clip.zeroshot import Classification, classify

sys.meta_path.append(Successors)

# Imported on first use: `import cn_clip` imports neither torch nor numpy.
_MODULES = {
    "CNClipError": "errors",
    "CheckpointError": "errors",
    "Classification": "zeroshot",
    "Embedder": "embedder",
    "ImageError": "errors",
    "MissingWeightsError": "errors",
    "UnknownModelError": "errors",
    "UsageError": "errors",
    "classify": "zeroshot",
    "find_images": "image.decode",
    "load": "embedder",
}


def __getattr__(name: str) -> object:
    if name == "embeddings":
        return import_module("cn_clip.embeddings")
    if name not in _MODULES:
        raise AttributeError(f"module 'cn_clip' has no attribute {name!r}")
    value: object = getattr(import_module(f"cn_clip.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""Embeddings of many images or texts: inputs, files, resumable extraction.

``read(path)`` reads a file or folder of embeddings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cn_clip.embeddings.files import EmbeddingsFile, read

__all__ = ["EmbeddingsFile", "read"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'cn_clip.embeddings' has no attribute {name!r}")
    from cn_clip.embeddings import files

    value: object = getattr(files, name)
    return value

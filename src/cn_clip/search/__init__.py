"""Search of images by text or image: a library on disk, its index, and queries.

>>> import cn_clip.search
>>> library = cn_clip.search.open("photos")
>>> library.search("海边的日落", k=10)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cn_clip.search.filters import Filters
    from cn_clip.search.hit import Hit
    from cn_clip.search.library import Library, open

__all__ = ["Filters", "Hit", "Library", "open"]

_MODULES = {"Filters": "filters", "Hit": "hit", "Library": "library", "open": "library"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'cn_clip.search' has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"cn_clip.search.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

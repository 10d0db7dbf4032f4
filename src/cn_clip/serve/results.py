"""The library as clients see it: results, and paths that begin with the name of a root."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import PurePath
from typing import Any

from cn_clip.search.filters import Filters
from cn_clip.search.folder import LibraryFolder
from cn_clip.search.hit import Hit
from cn_clip.serve.problems import RequestError
from cn_clip.serve.schemas import SearchFilters
from cn_clip.text import path_text
from cn_clip.translation import _


class Places:
    """Paths of a library relative to its roots, which do not show where they are on the disk."""

    def __init__(self, library: LibraryFolder, *, absolute: bool) -> None:
        """Read the roots.

        Args:
            library: the library.
            absolute: whether paths stay absolute.
        """
        rows = library.query("SELECT kind, location FROM roots ORDER BY id")
        self._absolute = absolute
        self.roots: list[tuple[str, str]] = []  # (shown name, path of the folder or URI)
        seen: Counter[str] = Counter()
        for _kind, location in rows:
            path = path_text(os.fsdecode(location))
            name = PurePath(path).name or path
            seen[name] += 1
            self.roots.append((name if seen[name] == 1 else f"{name} ({seen[name]})", path))

    def shown(self, path: str) -> str:
        """Return a path as clients see it."""
        if self._absolute:
            return path
        for name, root in self.roots:
            if path.startswith(root) and path[len(root) : len(root) + 1] in ("/", "\\", "#", ""):
                return name + path[len(root) :].replace("\\", "/")
        return PurePath(path).name

    def folder(self, shown: str) -> str:
        """Return the absolute path of a folder that clients see.

        Raises:
            RequestError: it is in no root.
        """
        if self._absolute and os.path.isabs(shown):
            return shown
        first, _slash, rest = shown.strip("/").partition("/")
        for name, root in self.roots:
            if name == first and "\0" not in rest and ".." not in PurePath(rest).parts:
                return os.path.join(root, rest) if rest else root
        raise RequestError(
            _(
                "no indexed folder is called {folder}; available: {known}",
                folder=shown,
                known=", ".join(name for name, _root in self.roots),
            ),
            param="filters.folder",
        )


def filters_of(given: SearchFilters | None, places: Places) -> Filters | None:
    """Return the filters of a request.

    Raises:
        RequestError: the folder is unknown.
    """
    if given is None:
        return None
    values: dict[str, Any] = {
        name: value for name, value in given.model_dump().items() if value not in (None, "")
    }
    if "folder" in values:
        values["folder"] = places.folder(values["folder"])
    return Filters(**values) if values else None


def found(hit: Hit, places: Places) -> dict[str, Any]:
    """Return a result for JSON."""
    values = hit.to_dict()
    del values["uri"]  # it has the whole path
    values["path"] = places.shown(hit.path)
    values["copies"] = [places.shown(path) for path in hit.copies]
    values["image"] = f"/v1/images/{hit.id}"
    values["thumbnail"] = f"/v1/images/{hit.id}/thumbnail"
    return values

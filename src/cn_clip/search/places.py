"""Where libraries are: by name in one folder, or by path."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cn_clip.errors import LibraryError, UsageError
from cn_clip.files import as_path, variable_folder
from cn_clip.format_version import FIELD, Format
from cn_clip.outputs import json_object_at
from cn_clip.text import path_text
from cn_clip.translation import _

DEFAULT = "default"
VARIABLE = "CN_CLIP_LIBRARIES"
ABOUT = "library.json"
LIBRARY = Format("library", 1)

_NAME = re.compile(r"[\w][\w.-]*")


def libraries_folder() -> Path:
    """Return ``$CN_CLIP_LIBRARIES``, by default ``~/.local/share/cn_clip/libraries``.

    Raises:
        UsageError: the home folder is unknown.
    """
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return variable_folder(VARIABLE, os.path.join(data, "cn_clip", "libraries"))


def library_path(name_or_path: str | os.PathLike[str] = DEFAULT) -> Path:
    """Return the folder of a library; it may not exist.

    A name such as ``photos`` is a folder in ``libraries_folder()``; anything with a separator, or
    an existing library or folder of embeddings in the current folder, is a path.

    Raises:
        UsageError: it is neither a name nor a path.
    """
    path = as_path(name_or_path)
    text = os.fspath(name_or_path)
    if os.sep in text or "/" in text or text.startswith(("~", ".")):
        return path
    if is_library(path) or is_shard_folder(path):
        return path
    if not _NAME.fullmatch(text):
        raise UsageError(
            _(
                "{name!r} is not a name of a library; give letters and digits, or a path such as "
                "./{name}",
                name=text,
            )
        )
    return libraries_folder() / text


def is_library(path: Path) -> bool:
    """Return whether a folder is a library, of any version."""
    return str(json_object_at(path / ABOUT).get(FIELD, "")).startswith(f"cn-clip {LIBRARY.name} ")


def is_shard_folder(path: Path) -> bool:
    """Return whether a folder holds embedding shards, and is no library."""
    return (path / "img_emb").is_dir() and not is_library(path)


def check_library(path: Path) -> None:
    """Check that a folder is a library of this version.

    Raises:
        LibraryError: it is none, or of a newer version.
    """
    if not path.exists():
        raise LibraryError(
            _(
                "there is no library {library}; make one with: cn-clip index FOLDER --library "
                "{library}",
                library=path_text(os.path.abspath(path)),  # without a separator, it is a name
            )
        )
    about = json_object_at(path / ABOUT)
    if FIELD not in about and (is_shard_folder(path) or path.suffix in (".npz", ".jsonl")):
        raise LibraryError(
            _(
                "{library} holds embeddings; make a library of them with: cn-clip library import "
                "{library} --library NEW",
                library=path_text(path),
            )
        )
    if FIELD not in about and (path / ABOUT).exists():
        raise LibraryError(
            _(
                "{file} is damaged; copy it from a backup, or from another library",
                file=path_text(path / ABOUT),
            )
        )
    if FIELD not in about:
        raise LibraryError(
            _(
                "{library} is not a library: it has no {file}; give the folder of one",
                library=path_text(path),
                file=ABOUT,
            )
        )
    LIBRARY.check(about[FIELD], path_text(path / ABOUT), LibraryError, _("make a new library"))


def named_libraries() -> list[Path]:
    """Return the libraries in ``libraries_folder()``, by name."""
    folder = libraries_folder()
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_library(path))

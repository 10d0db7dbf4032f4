"""What a library holds: roots, models, counts and sizes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cn_clip.errors import CNClipError
from cn_clip.search.database import DATABASE
from cn_clip.search.folder import CACHE, LibraryFolder, StoredModel
from cn_clip.search.places import named_libraries
from cn_clip.search.thumbnails import THUMBNAILS
from cn_clip.text import path_text
from cn_clip.translation import N_


@dataclass(frozen=True, slots=True)
class RootFacts:
    """A folder or source of a library: its location, and numbers of present, absent and unreadable
    files; ``exists`` is None for a source."""

    location: str
    files: int
    absent: int
    failed: int
    exists: bool | None


@dataclass(frozen=True, slots=True)
class LibraryFacts:
    """Facts of a library.

    Attributes:
        path: of its folder.
        images: with a file, which searches find; ``hidden``: without.
        files, failed: present files, and those of them that cannot be decoded.
        missing: images with a file, but without a vector of the active model.
        removed: ids of images that were removed for good.
        with_text: images in which a text was recognised.
        journal: of SQLite, ``wal`` or ``delete``.
        roots, models: what was indexed, and with which models.
        sizes: bytes of the database, vectors, thumbnails and cache.
    """

    path: str
    images: int
    hidden: int
    files: int
    failed: int
    missing: int
    removed: int
    with_text: int
    journal: str
    roots: list[RootFacts]
    models: list[StoredModel]
    sizes: dict[str, int]

    @property
    def model(self) -> StoredModel | None:
        """The active model."""
        return next((model for model in self.models if model.state == "active"), None)


@dataclass(frozen=True, slots=True)
class NamedLibrary:
    """A library in the folder of libraries; ``error`` says why it cannot be opened."""

    name: str
    images: int = 0
    model: str | None = None
    size: int = 0
    error: str | None = None


def library_facts(library: LibraryFolder) -> LibraryFacts:
    """Return the facts of a library.

    Raises:
        LibraryError: the database is damaged.
    """

    def count(statement: str, values: tuple[Any, ...] = ()) -> int:
        number: int = library.query(statement, values)[0][0]
        return number

    models = library.models()
    active = next((model.id for model in models if model.state == "active"), 0)
    return LibraryFacts(
        path_text(library.path),
        count("SELECT COUNT(*) FROM images WHERE files > 0"),
        count("SELECT COUNT(*) FROM images WHERE files = 0"),
        count("SELECT COUNT(*) FROM files WHERE present"),
        count("SELECT COUNT(*) FROM files WHERE present AND error IS NOT NULL"),
        count(
            "SELECT COUNT(*) FROM missing JOIN images ON images.id = missing.image "
            "WHERE missing.model = ? AND images.files > 0",
            (active,),
        ),
        count("SELECT COUNT(*) FROM erasures"),
        count("SELECT COUNT(*) FROM images WHERE text IS NOT NULL AND text != ''"),
        library.query("PRAGMA journal_mode")[0][0],
        [
            RootFacts(
                path_text(os.fsdecode(location)),
                present,
                absent,
                failed,
                os.path.isdir(location) if kind == "folder" else None,
            )
            for kind, location, present, absent, failed in library.query(
                "SELECT kind, location, COALESCE(SUM(present), 0), COALESCE(SUM(NOT present), 0), "
                "COALESCE(SUM(present AND error IS NOT NULL), 0) FROM roots "
                "LEFT JOIN files ON files.root = roots.id GROUP BY roots.id ORDER BY roots.id"
            )
        ],
        models,
        sizes(library.path),
    )


def sizes(path: Path) -> dict[str, int]:
    """Return the bytes that the parts of a library take."""
    parts = (N_("database"), N_("vectors"), N_("thumbnails"), N_("cache"))
    found = dict.fromkeys(parts, 0)
    for folder, _folders, names in os.walk(path):
        top = (*Path(folder).relative_to(path).parts, "")[0]
        for name in names:
            part = {THUMBNAILS: "thumbnails", CACHE: "cache"}.get(top)
            if name.endswith(".f16"):
                part = "vectors"
            elif name.startswith(DATABASE):
                part = "database"
            if part:
                try:
                    status = os.stat(os.path.join(folder, name))
                except OSError:  # deleted meanwhile
                    continue
                # Pages of removed vectors take no space.
                blocks = getattr(status, "st_blocks", None)
                size = status.st_size if blocks is None else min(status.st_size, blocks * 512)
                found[part] += size
    return found


def all_named() -> list[NamedLibrary]:
    """Return the libraries in the folder of libraries, by name; none is refused."""
    found = []
    for path in named_libraries():
        name = path_text(path.name)
        try:
            with LibraryFolder(path) as library:
                model = library.active_model()
                (images,) = library.query("SELECT COUNT(*) FROM images WHERE files > 0")[0]
        except CNClipError as error:
            found.append(NamedLibrary(name, error=str(error)))
            continue
        found.append(
            NamedLibrary(name, images, model.name if model else None, sum(sizes(path).values()))
        )
    return found

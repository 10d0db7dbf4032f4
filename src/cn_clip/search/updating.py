"""One run of ``cn-clip index``: the library created, its model loaded, its images brought up to
date, and embedded again if the model is another."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cn_clip.embedder import Embedder, locate
from cn_clip.errors import UsageError
from cn_clip.search.background import prepare_search
from cn_clip.search.folder import CACHE, LibraryFolder, StoredModel, create
from cn_clip.search.indexing import Progress, index
from cn_clip.search.library_model import check_same, load_for, same_origin
from cn_clip.search.migration import Migration, migrate
from cn_clip.search.places import is_library
from cn_clip.search.purge import finish_erasures
from cn_clip.search.roots import Root, check_nesting, check_readable, parse_root
from cn_clip.search.words import refresh_words
from cn_clip.text import path_text
from cn_clip.translation import _

_DEFAULT_MODEL = "mini"


@dataclass(frozen=True, slots=True)
class Update:
    """What a run did: its counts, and those of the migration if the model is another."""

    model: str
    progress: Progress
    migration: Migration | None


def open_for_update(
    path: Path, sources: Sequence[str], *, model: str | None = None
) -> LibraryFolder:
    """Open a library for writing; create it if it is new.

    Raises:
        UsageError: it is new, and no source is given, or one that does not exist; or the folder
            holds other files.
        DataError: it is new, and a source does not exist.
        CNClipError: it is new, and the model does not exist or cannot be downloaded.
    """
    if not is_library(path):
        if not sources:
            raise UsageError(
                _(
                    "there is no library {library}; give the folders to index: cn-clip index "
                    "PHOTOS",
                    library=path_text(path),
                )
            )
        for source in sources:  # a mistake in one leaves no empty library
            check_readable(parse_root(source))
        locate(model or _DEFAULT_MODEL)
        create(path)
    return LibraryFolder(path, writable=True)


def roots_to_update(
    library: LibraryFolder,
    sources: Sequence[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    hidden: bool = False,
) -> list[Root]:
    """Return the roots to index: those given, else all of the library.

    A folder that was indexed before keeps its globs, unless others are given.

    Raises:
        UsageError: a root is invalid, is the library itself, or lies in another root.
        DataError: a new source does not exist, or cannot be read.
    """
    stored = {
        bytes(location): Root(kind, bytes(location), json.loads(inc), json.loads(exc), bool(hid))
        for kind, location, inc, exc, hid in library.query(
            "SELECT kind, location, include, exclude, hidden FROM roots ORDER BY id"
        )
    }
    if not sources:
        if not stored:
            raise UsageError(
                _(
                    "{library} has no folders yet; give some: cn-clip index PHOTOS",
                    library=path_text(library.path),
                )
            )
        return list(stored.values())
    given = []
    for source in sources:
        root = parse_root(source, include=include, exclude=exclude, hidden=hidden)
        if root.location not in stored:  # it would be looked for in every later run
            check_readable(root)
        elif not (include or exclude or hidden):
            root = stored[root.location]
        given.append(root)
    check_nesting([*stored.values(), *given])
    return list({root.location: root for root in given}.values())


def update(
    library: LibraryFolder,
    roots: Sequence[Root],
    load: Callable[[str], Embedder],
    *,
    load_own: Callable[[LibraryFolder, StoredModel], Embedder] = load_for,
    model: str | None = None,
    thumbnails: bool = True,
    keep_old: bool = True,
    without_unreadable: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_migration: Callable[[Migration], None] = lambda migration: None,
) -> Update:
    """Bring a library up to date. Its writer's lock must be held.

    Args:
        library: opened for writing.
        roots: from ``roots_to_update``.
        load: loads a model by name.
        load_own: loads the library's own model.
        model: by default that of the library.
        thumbnails: whether to make them.
        keep_old, without_unreadable: as in ``migrate``.
        on_progress, on_migration: called after each commit.

    Raises:
        LibraryError: the stored vectors do not fit the model, or some are lost.
    """
    finish_erasures(library)
    refresh_words(library)
    active = library.active_model()
    if active is not None:
        library.vector_file(active).open(active.rows)  # a file cut short would get a gap
    name = model or (active.name if active else _DEFAULT_MODEL)
    migration = None

    @cache
    def load_model() -> Embedder:
        return load(name) if active is None or model is not None else load_own(library, active)

    if active is not None and model is not None:
        embedder = load_model()
        if same_origin(active, embedder):
            check_same(library, active, embedder)
        else:
            migration = migrate(
                library,
                embedder,
                name,
                keep_old=keep_old,
                without_unreadable=without_unreadable,
                on_progress=on_migration,
            )
            if not migration.switched:
                return Update(name, Progress(), migration)
    progress = index(
        library, roots, load_model, name, thumbnails=thumbnails, on_progress=on_progress
    )
    # Without a change, the model need not even be loaded.
    if progress.embedded or migration is not None or not (library.path / CACHE).is_dir():
        prepare_search(library, load_model())
    return Update(name, progress, migration)

"""A library embedded again with another model, while the old vectors are searched."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cn_clip.backends.pipeline import PreparedImage
from cn_clip.embedder import Embedder
from cn_clip.errors import CNClipError, ImageError, LibraryError
from cn_clip.processes import usable_cpus
from cn_clip.search.folder import LibraryFolder, StoredModel, add_model
from cn_clip.search.indexing import COMMIT_IMAGES, COMMIT_SECONDS
from cn_clip.search.reading import digest_of
from cn_clip.search.roots import Entry, Root
from cn_clip.search.vector_file import DTYPE
from cn_clip.text import path_text
from cn_clip.translation import _

_THREADS = 4


@dataclass(slots=True)
class Migration:
    """A migration so far.

    Attributes:
        total: images to embed, of all runs.
        done: images embedded or unreadable, of all runs.
        unreadable: paths of images without a readable file; they have no vector afterwards.
        switched: whether searches use the new model.
        seconds: of this run.
    """

    total: int = 0
    done: int = 0
    unreadable: list[str] = field(default_factory=list)
    switched: bool = False
    seconds: float = 0.0


def migrate(
    library: LibraryFolder,
    embedder: Embedder,
    model_name: str,
    *,
    keep_old: bool = True,
    without_unreadable: bool = False,
    on_progress: Callable[[Migration], None] = lambda migration: None,
) -> Migration:
    """Embed all images of a library with another model, then search with it.

    Until the switch, which is one transaction, searches use the old vectors. An interrupted
    migration to the same model goes on.

    Args:
        library: opened for writing, locked by ``LibraryFolder.writing``.
        embedder: the new model.
        model_name: as ``load`` takes it.
        keep_old: whether to keep the old vectors, for a way back.
        without_unreadable: switch even if files of images cannot be read now.
        on_progress: called after each commit.

    Raises:
        CNClipError: the disk is full; the finished part stays.
    """
    model = _building(library, embedder, model_name)
    state = Migration(total=_last_image(library), done=model.rows)
    start = last = time.perf_counter()
    pool = ThreadPoolExecutor(min(_THREADS, usable_cpus()), thread_name_prefix="cn_clip-index")
    waiting: deque[tuple[int, Future[PreparedImage | str]]] = deque()
    ready: list[tuple[int, PreparedImage | str]] = []

    def commit() -> None:
        nonlocal last
        _commit(library, model, embedder, state, ready)
        ready.clear()
        last = time.perf_counter()
        state.seconds = last - start
        on_progress(state)

    try:
        for image in range(model.rows + 1, state.total + 1):
            waiting.append((image, pool.submit(_prepare, library, embedder, image)))
            if len(waiting) >= 2 * embedder.batch_size:
                number, future = waiting.popleft()
                ready.append((number, future.result()))
            if len(ready) >= COMMIT_IMAGES or (
                ready and time.perf_counter() - last >= COMMIT_SECONDS
            ):
                commit()
        ready += [(number, future.result()) for number, future in waiting]
        waiting.clear()
        commit()
    finally:
        for _number, future in waiting:
            future.cancel()
        pool.shutdown(cancel_futures=True)
    state.unreadable = _unreadable(library, model)
    if not state.unreadable or without_unreadable:
        switch(library, model, keep_old=keep_old)
        state.switched = True
    return state


def switch(library: LibraryFolder, model: StoredModel, *, keep_old: bool = True) -> None:
    """Search with another model of the library from now on, in one transaction."""
    old = library.active_model()
    with library.database.transaction() as connection:
        connection.execute("UPDATE models SET state = 'kept' WHERE state = 'active'")
        connection.execute("UPDATE models SET state = 'active' WHERE id = ?", (model.id,))
    if old is not None and not keep_old:
        remove_model(library, old)


def remove_model(library: LibraryFolder, model: StoredModel) -> None:
    """Delete the vectors of a model that is not active."""
    with library.database.transaction() as connection:
        connection.execute("DELETE FROM missing WHERE model = ?", (model.id,))
        connection.execute("DELETE FROM models WHERE id = ? AND state != 'active'", (model.id,))
    # A reader may have it mapped; on Windows the file then stays until the next writer.
    with suppress(OSError):
        library.vector_file(model).path.unlink(missing_ok=True)


def _building(library: LibraryFolder, embedder: Embedder, name: str) -> StoredModel:
    """Return the model that is being built, a new one if there is none.

    The vectors of an earlier, unfinished migration to a third model are deleted; those of a kept
    model are completed.
    """
    known = None
    for model in library.models():
        if model.state != "active" and model.fingerprint == embedder.fingerprint:
            known = model
        elif model.state == "building":
            remove_model(library, model)
    if known is None:
        with library.database.transaction() as connection:
            number = add_model(connection, name, embedder, "building")
        known = next(model for model in library.models() if model.id == number)
    return known


def _last_image(library: LibraryFolder) -> int:
    active = library.active_model()
    return 0 if active is None else active.rows


def _prepare(library: LibraryFolder, embedder: Embedder, image: int) -> PreparedImage | str:
    """In a thread: read and decode an image; return why not, or "" if it has no file at all."""
    rows = library.query(
        "SELECT roots.kind, roots.location, files.name, files.position, images.digest FROM files "
        "JOIN roots ON roots.id = files.root JOIN images ON images.id = files.image "
        "WHERE files.image = ? ORDER BY files.present DESC, files.id",
        (image,),
    )
    reason = ""
    for kind, location, name, position, digest in rows:
        root = Root(kind, location)
        try:
            content = root.read(Entry(name, 0, 0, position))
            if digest_of(content) == digest:
                return embedder.prepare_image(content)
            reason = reason or _("its file has changed; run cn-clip index first")
        except (CNClipError, OSError) as error:
            reason = reason or str(error)
    return reason


def _commit(
    library: LibraryFolder,
    model: StoredModel,
    embedder: Embedder,
    state: Migration,
    ready: list[tuple[int, PreparedImage | str]],
) -> None:
    if not ready:
        return
    first = ready[0][0]
    vectors: npt.NDArray[np.float16] = np.zeros((len(ready), embedder.dim), DTYPE)
    readable = [(image, pixels) for image, pixels in ready if not isinstance(pixels, str)]
    for at in range(0, len(readable), embedder.batch_size):
        batch = readable[at : at + embedder.batch_size]
        rows = [image - first for image, _pixels in batch]
        vectors[rows] = embedder.embed_prepared_images([pixels for _image, pixels in batch])
    library.vector_file(model).write(first - 1, vectors)
    missing = [(model.id, image) for image, pixels in ready if isinstance(pixels, str)]
    with library.database.transaction() as connection:
        connection.executemany("INSERT OR IGNORE INTO missing VALUES (?, ?)", missing)
        connection.execute(
            "UPDATE models SET rows = ? WHERE id = ?", (first - 1 + len(ready), model.id)
        )
    state.done = first - 1 + len(ready)


def _unreadable(library: LibraryFolder, model: StoredModel) -> list[str]:
    """Return the paths of images that should be searchable but have no vector."""
    from cn_clip.search.roots import display_path

    return [
        display_path(*row)
        for row in library.query(
            "SELECT roots.kind, roots.location, files.name FROM missing "
            "JOIN files ON files.image = missing.image JOIN roots ON roots.id = files.root "
            "WHERE missing.model = ? AND files.present",
            (model.id,),
        )
    ]

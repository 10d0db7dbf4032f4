"""A library embedded again with another model, while the old vectors are searched."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cn_clip.backends.pipeline import PreparedImage
from cn_clip.embedder import Embedder
from cn_clip.errors import CNClipError
from cn_clip.processes import usable_cpus
from cn_clip.search.folder import LibraryFolder, StoredModel, add_model
from cn_clip.search.indexing import COMMIT_IMAGES, COMMIT_SECONDS
from cn_clip.search.reading import digest_of
from cn_clip.search.roots import Entry, Root, display_path
from cn_clip.search.vector_file import DTYPE

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
    run = _Run(library, embedder, model, state, on_progress)
    # Those that could not be read in an earlier run, then those that follow.
    run.embed([image for image in _readable_again(library, model) if image <= model.rows])
    run.embed(range(model.rows + 1, state.total + 1))
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


def remove_unused_vectors(library: LibraryFolder) -> int:
    """Delete the vector files of no model, which an interruption left; return their number."""
    unused = unused_vectors(library)
    for path in unused:
        with suppress(OSError):
            path.unlink()
    return len(unused)


def unused_vectors(library: LibraryFolder) -> list[Path]:
    """Return the vector files that belong to no model."""
    used = {model.file_name for model in library.models()}
    return [path for path in sorted(library.path.glob("vectors-*.f16")) if path.name not in used]


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


class _Run:
    """A run of a migration: images are read in threads while the model runs, and committed
    together."""

    def __init__(
        self,
        library: LibraryFolder,
        embedder: Embedder,
        model: StoredModel,
        state: Migration,
        on_progress: Callable[[Migration], None],
    ) -> None:
        self.library, self.embedder, self.model = library, embedder, model
        self.state, self.on_progress = state, on_progress
        self.start = self.last_commit = time.perf_counter()
        self.roots: dict[bytes, Root] = {}  # a source is opened once
        self.batch: list[tuple[int, PreparedImage]] = []
        self.done: dict[int, npt.NDArray[np.float32] | None] = {}  # image -> vector, if readable

    def embed(self, images: Sequence[int]) -> None:
        """Embed images, in ascending order, and commit their vectors."""
        if not images:
            return
        pool = ThreadPoolExecutor(min(_THREADS, usable_cpus()), thread_name_prefix="cn_clip-index")
        waiting: deque[tuple[int, Future[PreparedImage | None]]] = deque()
        try:
            for image in images:
                waiting.append((image, pool.submit(self._prepare, image)))
                if len(waiting) >= 2 * self.embedder.batch_size:
                    self._take(*waiting.popleft())
            while waiting:
                self._take(*waiting.popleft())
            self._commit()
        finally:  # after an error or Ctrl-C, stop reading
            for _image, future in waiting:
                future.cancel()
            pool.shutdown(cancel_futures=True)

    def _prepare(self, image: int) -> PreparedImage | None:
        """In a thread: read and decode an image; None if no file has its content now."""
        for kind, location, name, position, digest in self.library.query(
            "SELECT roots.kind, roots.location, files.name, files.position, images.digest "
            "FROM files JOIN roots ON roots.id = files.root JOIN images ON images.id = files.image "
            "WHERE files.image = ? ORDER BY files.present DESC, files.id",
            (image,),
        ):
            root = self.roots.setdefault(location, Root(kind, location))
            with suppress(CNClipError, OSError):
                content = root.read(Entry(name, 0, 0, position))
                if digest_of(content) == digest:
                    return self.embedder.prepare_image(content)
        return None

    def _take(self, image: int, future: Future[PreparedImage | None]) -> None:
        prepared = future.result()
        if prepared is None:
            self.done[image] = None
        else:
            self.batch.append((image, prepared))
        if len(self.batch) >= self.embedder.batch_size:
            self._embed()
        late = time.perf_counter() - self.last_commit >= COMMIT_SECONDS
        if len(self.done) + len(self.batch) >= COMMIT_IMAGES or late:
            self._commit()

    def _embed(self) -> None:
        if self.batch:
            vectors = self.embedder.embed_prepared_images([pixels for _image, pixels in self.batch])
            self.done |= zip((image for image, _pixels in self.batch), vectors, strict=True)
            self.batch = []

    def _commit(self) -> None:
        """Write the vectors, then their number."""
        self._embed()
        images = np.array(sorted(self.done), np.int64)
        vectors = np.zeros((len(images), self.embedder.dim), DTYPE)
        for row, image in enumerate(images.tolist()):
            if (vector := self.done[image]) is not None:
                vectors[row] = vector
        if len(images):
            self.library.vector_file(self.model).overwrite(images - 1, vectors)
        unreadable = [(self.model.id, image) for image in self.done if self.done[image] is None]
        readable = [(self.model.id, image) for image in self.done if self.done[image] is not None]
        with self.library.database.transaction() as connection:
            connection.executemany("INSERT OR IGNORE INTO missing VALUES (?, ?)", unreadable)
            connection.executemany("DELETE FROM missing WHERE model = ? AND image = ?", readable)
            last = max(self.done, default=0)
            connection.execute(
                "UPDATE models SET rows = MAX(rows, ?) WHERE id = ?", (last, self.model.id)
            )
        self.state.done = max(self.state.done, last)
        self.done = {}
        self.last_commit = time.perf_counter()
        self.state.seconds = self.last_commit - self.start
        self.on_progress(self.state)


def _readable_again(library: LibraryFolder, model: StoredModel) -> list[int]:
    """Return the images without a vector that have a file, in ascending order."""
    rows = library.query(
        "SELECT DISTINCT missing.image FROM missing JOIN files ON files.image = missing.image "
        "WHERE missing.model = ? AND files.present ORDER BY missing.image",
        (model.id,),
    )
    return [image for (image,) in rows]


def _unreadable(library: LibraryFolder, model: StoredModel) -> list[str]:
    """Return the paths of images that should be searchable but have no vector."""
    return [
        display_path(*row)
        for row in library.query(
            "SELECT roots.kind, roots.location, files.name FROM missing "
            "JOIN files ON files.image = missing.image JOIN roots ON roots.id = files.root "
            "WHERE missing.model = ? AND files.present",
            (model.id,),
        )
    ]

"""``Library``: search by text and image."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.config import BackendName, Precision
from cn_clip.embedder import Embedder
from cn_clip.errors import UsageError
from cn_clip.image.decode import ImageInput
from cn_clip.search.confidence import Confidence
from cn_clip.search.filters import Filters, allowed_images
from cn_clip.search.folder import CACHE, LibraryFolder, Snapshot, StoredModel
from cn_clip.search.hit import Hit
from cn_clip.search.library_model import load_for
from cn_clip.search.places import DEFAULT, library_path
from cn_clip.search.query import Query, embed_query, parse_query
from cn_clip.search.roots import display_path
from cn_clip.search.vectors import search_vectors
from cn_clip.translation import _


def open(
    library: str | os.PathLike[str] = DEFAULT,
    *,
    model: str | None = None,
    backend: BackendName = "auto",
    device: str = "auto",
    precision: Precision = "auto",
) -> Library:
    """Open a library for searching.

    Args:
        library: a name, or the path of a folder.
        model: by default the library's own; another runtime or precision of it is verified on
            a few images of the library first.
        backend, device, precision: as ``cn_clip.load``.

    Raises:
        LibraryError: there is no such library, or it is damaged or of a newer version.
    """
    return Library(library, model=model, backend=backend, device=device, precision=precision)


class Library:
    """A library opened for searching. Thread-safe; sees what other processes add to it.

    The model is loaded at the first query, or by ``warm_up``.
    """

    def __init__(
        self,
        library: str | os.PathLike[str] = DEFAULT,
        *,
        model: str | None = None,
        backend: BackendName = "auto",
        device: str = "auto",
        precision: Precision = "auto",
    ) -> None:
        """Arguments and errors as ``open``."""
        self.folder = LibraryFolder(library_path(library))
        self._given: dict[str, Any] = {
            "name": model,
            "backend": backend,
            "device": device,
            "precision": precision,
        }
        self._lock = threading.Lock()
        self._embedders: dict[int, Embedder] = {}
        self._confidences: dict[tuple[int, int], Confidence | None] = {}

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self.folder.close()

    def __len__(self) -> int:
        """Number of searchable images."""
        return self.folder.snapshot().count

    def embedder(self, model: StoredModel | None = None) -> Embedder:
        """Return the model of the library, loaded on first use.

        Raises:
            LibraryError: the library is empty, or of another model.
        """
        model = model or self.folder.snapshot().model
        with self._lock:
            found = self._embedders.get(model.id)
            if found is None:
                found = load_for(self.folder, model, **self._given)
                self._embedders = {model.id: found}  # that of a replaced model is released
        return found

    def search(
        self,
        query: str | Query = "",
        *,
        images: Sequence[ImageInput] = (),
        like: Sequence[int] = (),
        k: int = 10,
        filters: Filters | None = None,
    ) -> list[Hit]:
        """Return the best images for a query, the best first.

        Args:
            query: a sentence, or terms with signs and weights; see ``cn_clip.search.query``.
            images: images to resemble, added to the query.
            like: ids of images in the library to resemble.
            k: number of results.
            filters: conditions that all results meet.

        Returns:
            At most ``k`` hits. If no hit has ``matches``, nothing in the library matches.

        Raises:
            UsageError: the query is empty or invalid, or ``k`` is below 1.
            ImageError: an image is unreadable.
            LibraryError: the library is empty, damaged, or of another model.
        """
        if k < 1:
            raise UsageError(_("k = {k} is below 1; give 1 or more", k=k))
        snapshot = self.folder.snapshot()
        embedder = self.embedder(snapshot.model)
        parsed = parse_query(query) if isinstance(query, str) else query
        vector = embed_query(
            embedder, parsed, images=images, vectors=self._vectors_of(snapshot, like)
        )
        allowed = self._allowed(snapshot, filters)
        found = search_vectors(
            snapshot.vectors,
            vector[None],
            k,
            allowed=allowed,
            cache=self.folder.path / CACHE / str(snapshot.model.id),
        )
        return self._hits(snapshot, found.indexes[0] + 1, found.scores[0], vector)

    def _vectors_of(self, snapshot: Snapshot, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        for image in ids:
            if not 1 <= image <= len(snapshot.vectors) or not snapshot.vectors[image - 1].any():
                raise UsageError(
                    _("the library has no image {image}; see the ids of a search", image=image)
                )
        rows = np.array(ids, np.int64) - 1
        return snapshot.vectors[rows].astype(np.float32)

    def _allowed(self, snapshot: Snapshot, filters: Filters | None) -> npt.NDArray[np.bool_] | None:
        if not filters:
            return snapshot.searchable
        ids = allowed_images(self.folder.database.connection, filters)
        allowed = np.zeros(len(snapshot.vectors), np.bool_)
        allowed[ids[ids <= len(allowed)] - 1] = True
        return allowed if snapshot.searchable is None else allowed & snapshot.searchable

    def _hits(
        self,
        snapshot: Snapshot,
        ids: npt.NDArray[np.int64],
        cosines: npt.NDArray[Any],
        vector: npt.NDArray[np.float32],
    ) -> list[Hit]:
        hits = []
        for image, cosine in zip(ids.tolist(), cosines.tolist(), strict=True):
            facts = self.folder.query(
                "SELECT width, height, taken, text FROM images WHERE id = ?", (image,)
            )
            files = self.folder.query(
                "SELECT roots.kind, roots.location, files.name, files.caption FROM files "
                "JOIN roots ON roots.id = files.root WHERE files.image = ? AND files.present "
                "ORDER BY files.id",
                (image,),
            )
            if not facts or not files:  # removed since the snapshot
                continue
            (width, height, taken, text) = facts[0]
            paths = [display_path(kind, location, name) for kind, location, name, _unused in files]
            captions = [caption for *_unused, caption in files if caption]
            hits.append(
                Hit(
                    image,
                    paths[0],
                    cosine,
                    width,
                    height,
                    caption=captions[0] if captions else None,
                    text=text or None,
                    taken=taken,
                    copies=tuple(paths[1:]),
                )
            )
        return hits

"""``Library``: search by text and image."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.calibration import Calibration
from cn_clip.config import BackendName, Precision
from cn_clip.embedder import Embedder
from cn_clip.errors import UsageError
from cn_clip.image.decode import ImageInput
from cn_clip.search.background import cache_of, query_tail
from cn_clip.search.confidence import Confidence, calibration_of
from cn_clip.search.database import map_errors
from cn_clip.search.filters import Filters, allowed_images
from cn_clip.search.folder import LibraryFolder, Snapshot, StoredModel
from cn_clip.search.fulltext import match_expression
from cn_clip.search.fusion import CANDIDATES, Field, Fused, TextMatch, fuse, match_text
from cn_clip.search.hit import Hit
from cn_clip.search.images import thumbnail_of
from cn_clip.search.library_model import load_for
from cn_clip.search.places import DEFAULT, library_path
from cn_clip.search.query import Query, embed_query, parse_query
from cn_clip.search.roots import display_path, file_uri
from cn_clip.search.vectors import search_vectors
from cn_clip.translation import _

_FUSED = 100  # images of the ranking that a text match is compared with, at least
_TEXT_MATCHES = 0.3  # strength of a text match that counts as a match whatever the image
_TEXTS: dict[Field, str] = {
    "text": "SELECT images.id, images.text FROM image_words JOIN images "
    "ON images.id = image_words.rowid WHERE image_words MATCH ? ORDER BY rank LIMIT ?",
    "caption": "SELECT files.image, files.caption FROM caption_words JOIN files "
    "ON files.id = caption_words.rowid WHERE caption_words MATCH ? AND files.present "
    "AND files.image IS NOT NULL ORDER BY rank LIMIT ?",
}


def open(
    library: str | os.PathLike[str] = DEFAULT,
    *,
    model: str | None = None,
    backend: BackendName = "auto",
    device: str = "auto",
    precision: Precision = "auto",
    calibration: str | os.PathLike[str] | None = None,
) -> Library:
    """Open a library for searching.

    Args:
        library: a name, or the path of a folder.
        model: by default the library's own; another runtime or precision of it is verified on
            a few images of the library first.
        backend, device, precision: as ``cn_clip.load``.
        calibration: a file of ``cn-clip eval calibrate`` for the library's model; by default that
            in the package for mini. Without one, confidence is estimated from the library itself.

    Raises:
        LibraryError: there is no such library, or it is damaged or of a newer version.
    """
    return Library(
        library,
        model=model,
        backend=backend,
        device=device,
        precision=precision,
        calibration=calibration,
    )


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
        calibration: str | os.PathLike[str] | None = None,
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
        self._calibration_file = None if calibration is None else Path(calibration)
        self._calibrations: dict[str, Calibration | None] = {}

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

    def thumbnail(self, image: int) -> bytes | None:
        """Return the thumbnail of an image (WebP), or None if its file cannot be read."""
        return thumbnail_of(self.folder, image)

    def search(
        self,
        query: str | Sequence[str] | Query = "",
        *,
        images: Sequence[ImageInput] = (),
        like: Sequence[int | str] = (),
        k: int = 10,
        filters: Filters | None = None,
    ) -> list[Hit]:
        """Return the best images for a query, the best first.

        A query of one phrase is also looked for in captions and in the text recognised in images.

        Args:
            query: in the language of ``cn_clip.search.query``: a sentence, or terms with signs and
                weights. A sequence is the arguments of a command line.
            images: images to resemble.
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
        if not isinstance(query, Query):
            query = parse_query(query, images=images, like=like)
        snapshot = self.folder.snapshot()
        embedder = self.embedder(snapshot.model)
        vector = embed_query(embedder, query, vector_of=lambda image: _vector_of(snapshot, image))
        allowed = self._allowed(snapshot, filters)
        count = snapshot.count if allowed is None else int(np.count_nonzero(allowed))
        if not count:
            return []
        found = search_vectors(
            snapshot.vectors,
            vector[None],
            max(k, _FUSED) if query.is_phrase else k,
            allowed=allowed,
            cache=cache_of(self.folder, snapshot),
        )
        ids, cosines = found.indexes[0] + 1, found.scores[0]
        matches = self._text_matches(query, allowed)
        if matches:
            ids, cosines = _with_matches(snapshot, vector, ids, cosines, matches)
        fused = fuse(ids, cosines, matches, logit_scale=snapshot.model.logit_scale, k=k)
        confidence = Confidence(
            query_tail(self.folder, snapshot, embedder, query),
            count,
            self._calibration_of(embedder) if query.is_phrase else None,
        )
        return self._hits(fused, confidence)

    def _allowed(self, snapshot: Snapshot, filters: Filters | None) -> npt.NDArray[np.bool_] | None:
        if not filters:
            return snapshot.searchable
        with map_errors(self.folder.path):
            ids = allowed_images(self.folder.database.connection, filters)
        allowed = np.zeros(len(snapshot.vectors), np.bool_)
        allowed[ids[ids <= len(allowed)] - 1] = True
        return allowed if snapshot.searchable is None else allowed & snapshot.searchable

    def _text_matches(
        self, query: Query, allowed: npt.NDArray[np.bool_] | None
    ) -> dict[int, TextMatch]:
        """Return the images whose text or caption has a part of the query, with the match."""
        expression = match_expression(query.terms[0].text, partial=True) if query.is_phrase else ""
        if not expression:
            return {}
        matches: dict[int, TextMatch] = {}
        for field, statement in _TEXTS.items():
            for image, text in self.folder.query(statement, (expression, CANDIDATES)):
                if allowed is not None and not (image <= len(allowed) and allowed[image - 1]):
                    continue
                match = match_text(query.terms[0].text, text, field)
                known = matches.get(image)
                if match and (known is None or match.strength > known.strength):
                    matches[image] = match
        return matches

    def _calibration_of(self, embedder: Embedder) -> Calibration | None:
        key = embedder.fingerprint
        if key not in self._calibrations:
            self._calibrations[key] = calibration_of(embedder, self._calibration_file)
        return self._calibrations[key]

    def _hits(self, fused: Sequence[Fused], confidence: Confidence) -> list[Hit]:
        hits = []
        for result in fused:
            image = result.id
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
            kind, location, name, _unused = files[0]
            captions = [caption for *_unused, caption in files if caption]
            cosine = -1.0 if result.cosine is None else result.cosine
            accepted = confidence.accepts(cosine)
            by_text = result.match is not None and result.match.strength >= _TEXT_MATCHES
            # A probability is one of the image, which says nothing about its text.
            probability = None if by_text and not accepted else confidence.probability(cosine)
            hits.append(
                Hit(
                    image,
                    paths[0],
                    cosine,
                    width,
                    height,
                    probability=None if probability is None else float(probability),
                    matches=by_text or accepted,
                    why=result.reasons,
                    caption=captions[0] if captions else None,
                    text=text or None,
                    taken=taken,
                    copies=tuple(paths[1:]),
                    uri=file_uri(location, name) if kind == "folder" else None,
                )
            )
        return hits


def _vector_of(snapshot: Snapshot, image: int) -> npt.NDArray[np.float32]:
    """Return the vector (D,) of an image; zeros if there is none."""
    if not 1 <= image <= len(snapshot.vectors):
        return np.zeros(snapshot.model.dim, np.float32)
    vector: npt.NDArray[np.float32] = snapshot.vectors[image - 1].astype(np.float32)
    return vector


def _with_matches(
    snapshot: Snapshot,
    vector: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int64],
    cosines: npt.NDArray[Any],
    matches: Mapping[int, TextMatch],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Add the images that only their text found to an image ranking."""
    others = np.array(sorted(set(matches) - set(ids.tolist())), np.int64)
    others = others[others <= len(snapshot.vectors)]
    rows = snapshot.vectors[others - 1].astype(np.float32)
    ids, cosines = np.concatenate([ids, others]), np.concatenate([cosines, rows @ vector])
    order = np.argsort(-cosines, kind="stable")
    return ids[order], cosines[order]

"""``ShardLibrary``: search of a folder of embedding shards by text and image."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.config import BackendName, Precision
from cn_clip.embedder import Embedder, exported_model, load
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.image.decode import ImageInput, read_file
from cn_clip.search.confidence import (
    SAMPLE,
    Confidence,
    Tail,
    background_words,
    calibration_of,
    tail_of,
)
from cn_clip.search.filters import Filters
from cn_clip.search.hit import Hit
from cn_clip.search.query import Query, embed_query, parse_query
from cn_clip.search.reading import make_thumbnail
from cn_clip.shards.folder import ShardFolder, check_model
from cn_clip.shards.index import ShardIndex
from cn_clip.shards.metadata import Facts, MetadataReader
from cn_clip.shards.training import sample_rows
from cn_clip.translation import _


class ShardLibrary:
    """A folder of shards opened for searching. Thread-safe; it sees the shards of when it was
    opened, in an index or not.

    The model is loaded at the first query.
    """

    def __init__(
        self,
        path: Path,
        *,
        shards: range | None = None,
        model: str | None = None,
        backend: BackendName = "auto",
        device: str = "auto",
        precision: Precision = "auto",
        calibration: str | os.PathLike[str] | None = None,
    ) -> None:
        """Open a folder.

        Args:
            path: of the folder.
            shards: those that are searched, by default all.
            model: by default the one that the folder names.
            backend, device, precision: as ``cn_clip.load``.
            calibration: as ``cn_clip.search.open``.

        Raises:
            UsageError: there is no finished shard, or no model is named.
            DataError: the folder is damaged.
        """
        self.index = ShardIndex.open(path, shards)
        self._metadata = MetadataReader(self.index.folder)
        self._given: dict[str, Any] = {
            "backend": backend,
            "device": device,
            "precision": precision,
        }
        self._model = model
        self._calibration = None if calibration is None else Path(calibration)
        self._lock = threading.Lock()
        self._embedder: Embedder | None = None

    def __enter__(self) -> ShardLibrary:
        return self

    def __exit__(self, *_unused: object) -> None:
        return None

    def __len__(self) -> int:
        """Number of searchable images."""
        return self._count

    @cached_property
    def _count(self) -> int:
        return len(self.index)

    @property
    def folder(self) -> ShardFolder:
        """The shards that are searched."""
        return self.index.folder

    @property
    def model_name(self) -> str:
        """The model, as it is loaded.

        Raises:
            UsageError: none is given, and the folder names none.
        """
        name = self._model or self.folder.about.get("model")
        if not isinstance(name, str):
            raise UsageError(
                _(
                    "{path} does not name the model that made it; give --model",
                    path=self.folder.path,
                )
            )
        return name

    def embedder(self) -> Embedder:
        """Return the model, loaded on first use.

        Raises:
            LibraryError: it is not the one that embedded the shards.
        """
        with self._lock:
            if self._embedder is None:
                self._embedder = self.load_model()
            return self._embedder

    def load_model(self) -> Embedder:
        """Load the model, and check that it is the one of the shards. Errors as ``embedder``."""
        name = self.model_name
        given = name
        if set(self._given.values()) == {"auto"}:
            given = os.fspath(exported_model(name) or name)
        embedder = load(given, **self._given)
        check_model(self.folder, (embedder.fingerprint, embedder.derived_from), name)
        if embedder.dim != self.folder.dim:
            raise UsageError(
                _(
                    "{name} gives vectors of {width} values, and the shards have {dim}; give "
                    "--model",
                    name=name,
                    width=embedder.dim,
                    dim=self.folder.dim,
                )
            )
        return embedder

    def search(
        self,
        query: str | Sequence[str] | Query = "",
        *,
        images: Sequence[ImageInput] = (),
        like: Sequence[int | str] = (),
        k: int = 10,
        filters: Filters | None = None,
    ) -> list[Hit]:
        """Return the best images for a query, the best first. Captions are not searched.

        Args, returns and raises: as ``cn_clip.search.library.Library.search``; ids are those of
        ``cn_clip.shards.folder``, and there are no filters.
        """
        if k < 1:
            raise UsageError(_("k = {k} is below 1; give 1 or more", k=k))
        if filters is not None and filters:
            raise UsageError(
                _(
                    "shards are searched without filters; make a library of them with: cn-clip "
                    "library import"
                )
            )
        if not isinstance(query, Query):
            query = parse_query(query, images=images, like=like)
        embedder = self.embedder()
        vector = embed_query(embedder, query, vector_of=self.index.vector)
        found = self.index.search(vector[None], k)
        ids, cosines = found.indexes[0].tolist(), found.scores[0]
        facts = self.facts_of(ids)
        calibration = calibration_of(embedder, self._calibration) if query.is_phrase else None
        confidence = Confidence(self._tail(embedder, query), self._images, calibration)
        return [
            _hit(image, facts.get(image), float(cosine), confidence)
            for image, cosine in zip(ids, cosines, strict=True)
        ]

    def facts_of(self, ids: Sequence[int]) -> dict[int, Facts]:
        """Return what is known of images by their ids; those that do not exist are left out."""
        return self._metadata.read(ids)

    def content(self, image: int) -> bytes:
        """Return the encoded bytes of an image whose file is on this machine.

        Raises:
            DataError: there is no such image, or its file cannot be read.
        """
        facts = self.facts_of([image]).get(image)
        if facts is None:
            raise DataError(_("there is no image {image}", image=image))
        try:
            return read_file(facts.path)
        except (OSError, ValueError, CNClipError) as error:
            raise DataError(
                _("the file of image {image} cannot be read: {error}", image=image, error=error)
            ) from None

    def thumbnail(self, image: int) -> bytes | None:
        """Return a thumbnail of an image (WebP), or None if its file cannot be read."""
        with suppress(CNClipError):
            return make_thumbnail(self.content(image))
        return None

    @cached_property
    def _images(self) -> int:
        """The number of images that a query is compared with: those of the whole folder, or of the
        one that the index was trained on, so that a part gives the same probabilities."""
        trained = self.index.trained
        own = sum(self.index.rows_of(self.index.whole))
        return own if trained is None else max(own, trained.sampled_of)

    def _tail(self, embedder: Embedder, query: Query) -> Tail:
        """Return how frequent high cosines are for queries of this form."""
        if not query.is_phrase:
            return tail_of(query, self._words(embedder), self._sample)
        with self._lock:
            if not hasattr(self, "_phrase_tail"):
                self._phrase_tail = tail_of(query, self._words(embedder), self._sample)
            return self._phrase_tail

    def _words(self, embedder: Embedder) -> npt.NDArray[np.float32]:
        trained = self.index.trained
        if trained is not None:
            return trained.queries
        return embedder.embed_texts(background_words()[:: len(background_words()) // 256 or 1])

    @cached_property
    def _sample(self) -> npt.NDArray[np.float32]:
        trained = self.index.trained
        if trained is not None:
            return trained.sample.astype(np.float32)
        whole = self.index.whole
        return sample_rows(whole, self.index.rows_of(whole), SAMPLE)


def _hit(image: int, facts: Facts | None, cosine: float, confidence: Confidence) -> Hit:
    facts = facts or Facts("")
    path = Path(facts.path)
    return Hit(
        image,
        facts.path,
        cosine,
        facts.width,
        facts.height,
        probability=float(confidence.probability(cosine)),
        matches=confidence.accepts(cosine),
        caption=facts.caption or None,
        uri=path.as_uri() if path.is_absolute() else None,
    )

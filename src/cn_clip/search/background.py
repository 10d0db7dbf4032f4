"""What a library keeps in its cache for searches: codes or an index of its vectors, and the cosines
of generic words, from which the confidence of results is estimated."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cn_clip.arrays import read_npy
from cn_clip.cache import record_path
from cn_clip.embedder import Embedder
from cn_clip.errors import CNClipError, DataError
from cn_clip.outputs import json_object_at
from cn_clip.publish import atomic_file, map_write_errors, write_text
from cn_clip.search.confidence import SAMPLE, Tail, background_words, fit_tail, tail_of
from cn_clip.search.folder import CACHE, LibraryFolder, Snapshot
from cn_clip.search.query import Query
from cn_clip.search.vectors import prepare
from cn_clip.text import path_text

_WORDS, _TAIL = "words.npy", "tail.json"
_GROWTH = 2  # a tail is fitted again when the library is so many times larger or smaller


def cache_of(library: LibraryFolder, snapshot: Snapshot) -> Path:
    """Return the folder of the caches of a model's vectors; it may not exist."""
    return library.path / CACHE / str(snapshot.model.id)


def prepare_search(library: LibraryFolder, embedder: Embedder) -> None:
    """Bring the caches of a library up to date, so that the next search need not.

    It may run while others search. The caches may be deleted at any time.

    Raises:
        CNClipError: the disk is full or read-only.
    """
    snapshot = library.snapshot()
    if not snapshot.count:
        return
    cache = cache_of(library, snapshot)
    with map_write_errors(path_text(cache)):
        cache.mkdir(parents=True, exist_ok=True)
    words = _words(cache, embedder)
    phrase_tail(library, snapshot, embedder)
    prepare(snapshot.vectors, cache, words)


def phrase_tail(library: LibraryFolder, snapshot: Snapshot, embedder: Embedder) -> Tail:
    """Return the tail of the cosines of words in a library, from its cache if it is there."""
    cache = cache_of(library, snapshot)
    stored = json_object_at(cache / _TAIL)
    with suppress(KeyError, TypeError, ValueError):
        fits = 1 / _GROWTH <= snapshot.count / stored["images"] <= _GROWTH
        if fits and stored["words"] == len(background_words()):
            return Tail(
                tuple(map(float, stored["cosines"])),
                tuple(map(float, stored["fractions"])),
                float(stored["exponent"]),
            )
    tail = fit_tail(_words(cache, embedder), sample_of(snapshot))
    values = asdict(tail) | {"images": snapshot.count, "words": len(background_words())}
    with suppress(CNClipError, OSError):  # a read-only library: fitted each time
        cache.mkdir(parents=True, exist_ok=True)
        write_text(cache / _TAIL, json.dumps(values))
    return tail


def query_tail(
    library: LibraryFolder, snapshot: Snapshot, embedder: Embedder, query: Query
) -> Tail:
    """Return the tail for a query of any form."""
    if query.is_phrase:
        return phrase_tail(library, snapshot, embedder)
    words = _words(cache_of(library, snapshot), embedder)
    return tail_of(query, words, sample_of(snapshot))


def sample_of(snapshot: Snapshot) -> npt.NDArray[np.float32]:
    """Return vectors (S, D) of random searchable images, the same ones each time."""
    count = len(snapshot.vectors)
    rows = np.arange(count)
    if snapshot.searchable is not None:
        rows = np.flatnonzero(snapshot.searchable)
    if len(rows) > SAMPLE:
        rows = np.sort(np.random.default_rng(0).choice(rows, SAMPLE, replace=False))
    return snapshot.vectors[rows].astype(np.float32)


def _words(cache: Path, embedder: Embedder) -> npt.NDArray[np.float32]:
    """Return the embeddings (B, D) of the background words, kept in the cache; of a read-only
    library in the cache folder of the user."""
    expected = (len(background_words()), embedder.dim)
    own = record_path("words", [embedder.fingerprint, *background_words()])
    places = [cache / _WORDS, *([] if own is None else [own.with_suffix(".npy")])]
    for place in places:
        with suppress(DataError, OSError):
            stored = read_npy(place)
            fits = stored.shape == expected and stored.dtype == np.float32
            if fits and np.isfinite(stored).all():
                return stored
    words = embedder.embed_texts(background_words())
    for place in places:
        with suppress(CNClipError, OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(place) as path, path.open("wb") as stream:
                np.save(stream, words)
            break
    return words

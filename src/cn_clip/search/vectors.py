"""Search of a vector file, by the method that suits its size."""

from __future__ import annotations

import sys
import threading
import warnings
from dataclasses import dataclass, field, replace
from functools import cache as once
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.search.ann import ABOUT, FILE, AnnIndex, load_faiss
from cn_clip.search.codes import Codes
from cn_clip.search.exact import search_exact
from cn_clip.topk import TopK
from cn_clip.translation import _

Array = npt.NDArray[Any]

ANN_ROWS = 200_000  # from this size, an index is faster (docs/adr/0013-vectors-in-a-file.md)
_OPEN = 4  # caches kept open in a process


def search_vectors(
    vectors: Array,
    queries: Array,
    k: int,
    *,
    allowed: npt.NDArray[np.bool_] | None = None,
    cache: Path | None = None,
    threads: int | None = None,
) -> TopK:
    """Return the k best rows for each query: by an index from ``ANN_ROWS`` rows on, else exactly.

    An index or codes that are missing, damaged or of other vectors are not used; the search is then
    exact and reads all vectors. ``prepare`` makes them.

    Args:
        vectors: float16 (N, D), unit vectors or rows of zeros.
        queries: (Q, D), unit vectors.
        k: results per query.
        allowed: (N,), which rows may be returned; None for all.
        cache: the folder of ``prepare``; None for an exact search.
        threads: by default one per usable CPU.

    Returns, raises: as ``cn_clip.search.exact.search_exact``.
    """
    index, codes = (None, None) if cache is None else _caches.opened(cache, vectors)
    if index is not None:
        return index.search(queries, k, allowed=allowed, threads=threads)
    return search_exact(vectors, queries, k, allowed=allowed, codes=codes, threads=threads)


def prepare(vectors: Array, cache: Path, queries_sample: Array, *, recall: float = 0.98) -> None:
    """Make what ``search_vectors`` uses for a vector file of this size, unless it is up to date.

    It may run in a thread or process of its own while others search: files are replaced when
    complete. The folder may be deleted at any time. Without faiss, there is no index, and a warning
    says so once; such a library is searched exactly, by codes.

    Args:
        vectors: float16 (N, D).
        cache: a folder for this vector file alone.
        queries_sample: (S, D), unit vectors of texts such as will be searched for.
        recall: of the 10 best rows, for an index.

    Raises:
        UsageError: a query does not fit.
        CNClipError: the folder is not writable, or the disk is full.
    """
    if len(vectors) < ANN_ROWS or load_faiss() is None:
        if len(vectors) >= ANN_ROWS and sys.platform == "linux":
            _warn_of_missing_faiss()
        Codes.update(cache, vectors)
        return
    index = AnnIndex.open(cache, vectors)
    if index is None or index.is_outgrown:
        AnnIndex.build(vectors, cache, queries_sample, recall=recall)


@once
def _warn_of_missing_faiss() -> None:
    warnings.warn(
        _("a library of this size is searched faster with faiss: pip install faiss-cpu"),
        stacklevel=3,
    )


@dataclass(slots=True)
class _Caches:
    """What was opened last, each with the state of its files when it was opened."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    opened_last: dict[Path, tuple[object, AnnIndex | None, Codes | None]] = field(
        default_factory=dict
    )

    def opened(self, cache: Path, vectors: Array) -> tuple[AnnIndex | None, Codes | None]:
        """Return the index and the codes in a folder, opened again if a file or vectors changed."""
        names = (FILE, ABOUT, "codes.json") if len(vectors) >= ANN_ROWS else ("codes.json",)
        source = getattr(vectors, "filename", None)  # of a memory map, which may be opened anew
        place = vectors.ctypes.data if source is None else _state(Path(source))
        state = (place, vectors.shape, *(_state(cache / name) for name in names))
        with self.lock:
            known = self.opened_last.get(cache)
            if known is None or known[0] != state:
                index = AnnIndex.open(cache, vectors) if FILE in names else None
                codes = Codes.open(cache, vectors) if index is None else None
                known = (state, index, codes)
                self.opened_last.pop(cache, None)
                while len(self.opened_last) >= _OPEN:
                    del self.opened_last[next(iter(self.opened_last))]
                self.opened_last[cache] = known
            _unused, index, codes = known
        return (None if index is None else replace(index, vectors=vectors.view(np.ndarray))), codes


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


_caches = _Caches()

"""The lists of an index in one file, which faiss maps into memory.

``lists.bin`` has the codes of list 0, its ids, those of list 1, and so on: the layout of faiss's
``OnDiskInvertedLists`` without gaps. It is merged from parts block by block: a block of lists is
one run of rows in each part, since parts are sorted by list. Beside it are ``sizes.npy``, the rows
in each list, ``shards.npy``, what was indexed, and ``index.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.arrays import read_npy
from cn_clip.errors import CNClipError, DataError
from cn_clip.files import read_file
from cn_clip.format_version import FIELD, Format
from cn_clip.search.ann import load_faiss
from cn_clip.shards.encoding import Part
from cn_clip.shards.training import Trained
from cn_clip.translation import _

FORMAT = Format("shard index", 1)
LISTS, SIZES, SHARDS, ABOUT = "lists.bin", "sizes.npy", "shards.npy", "index.json"
_ID_BYTES = 8
_BLOCK_BYTES = 1 << 26  # of rows merged at a time


@dataclass(frozen=True, slots=True)
class Lists:
    """The lists of an index, opened.

    Attributes:
        index: faiss's, with the lists mapped.
        shards: int64 (S, 2), indexed shards and their rows, those without a direction included.
        about: what ``index.json`` says.
    """

    index: Any
    shards: npt.NDArray[np.int64]
    about: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, trained: Trained) -> Lists | None:
        """Return the lists in a folder; None if there are none of this training, or damaged ones.

        Damage inside the lists can hide results, but never returns a wrong score.
        """
        try:
            about = json.loads(read_file(folder / ABOUT))
            FORMAT.check(about[FIELD], folder / ABOUT, DataError, _("build it again"))
            sizes, shards = read_npy(folder / SIZES), read_npy(folder / SHARDS)
            if about["trained"] != trained.digest or about["digest"] != digest_of(sizes, shards):
                return None
            return cls(_with_lists(trained, sizes, folder / LISTS), shards, about)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, CNClipError):
            return None


def merge_parts(parts: Sequence[Part], code_bytes: int, out: Path) -> npt.NDArray[np.int64]:
    """Write the lists of all parts into one file; return the number of rows in each list.

    Memory: ``_BLOCK_BYTES`` three times, and the largest list.

    Raises:
        OSError: the disk is full.
    """
    sizes: npt.NDArray[np.int64] = np.sum([part.sizes for part in parts], axis=0)
    starts = [np.concatenate([[0], np.cumsum(part.sizes)]) for part in parts]
    with out.open("wb") as stream:
        for first, last in _blocks(sizes, _BLOCK_BYTES // (code_bytes + _ID_BYTES)):
            rows = np.concatenate(
                [
                    part.rows[start[first] : start[last]]
                    for part, start in zip(parts, starts, strict=True)
                ]
            )
            own = np.arange(first, last)
            numbers = np.concatenate([np.repeat(own, part.sizes[first:last]) for part in parts])
            rows = rows[np.argsort(numbers, kind="stable")]
            at = 0
            for size in sizes[first:last].tolist():
                stream.write(np.ascontiguousarray(rows["code"][at : at + size]).data)
                stream.write(np.ascontiguousarray(rows["id"][at : at + size]).data)
                at += size
    return sizes


def digest_of(sizes: npt.NDArray[Any], shards: npt.NDArray[Any]) -> str:
    """Return a checksum of what describes the lists."""
    digest = hashlib.blake2b(np.ascontiguousarray(sizes).tobytes(), digest_size=16)
    digest.update(np.ascontiguousarray(shards).tobytes())
    return digest.hexdigest()


def _blocks(sizes: npt.NDArray[np.int64], limit: int) -> list[tuple[int, int]]:
    """Split the lists into blocks of at most ``limit`` rows, or of one list."""
    blocks, first, rows = [], 0, 0
    for number, size in enumerate(sizes.tolist()):
        if rows and rows + size > limit:
            blocks.append((first, number))
            first, rows = number, 0
        rows += size
    return [*blocks, (first, len(sizes))]


def _with_lists(trained: Trained, sizes: npt.NDArray[np.int64], path: Path) -> Any:
    """Return a copy of the trained index whose lists are those in a file.

    Raises:
        ValueError: the file does not fit the sizes.
        OSError: it cannot be opened.
    """
    faiss = load_faiss()
    assert faiss is not None
    index = faiss.clone_index(trained.index)
    if sizes.shape != (index.nlist,) or sizes.dtype != np.int64 or (sizes < 0).any():
        raise ValueError(sizes.shape)
    wanted = int(sizes.sum()) * (index.code_size + _ID_BYTES)
    with path.open("rb") as stream:
        if os.fstat(stream.fileno()).st_size != wanted or not wanted:
            raise ValueError(wanted)
        lists = faiss.OnDiskInvertedLists()
        lists.nlist, lists.code_size, lists.read_only = index.nlist, index.code_size, True
        lists.lists.resize(index.nlist)
        unsigned = sizes.astype(np.uint64)  # named: a pointer keeps no array alive
        lists.set_all_lists_sizes(faiss.swig_ptr(unsigned))
        lists.totsize = wanted
        # By its number: the file that was measured, and no name that must be UTF-8.
        lists.filename = f"/proc/self/fd/{stream.fileno()}"
        lists.do_mmap()
    index.parallel_mode = 1  # threads share the lists of one query
    lists.prefetch_nthread = 0  # by default a search starts 32 threads to read its lists
    index.replace_invlists(lists, True)
    lists.this.disown()
    index.ntotal = int(sizes.sum())
    return index

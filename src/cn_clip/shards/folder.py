"""A folder of embedding shards, as ``cn-clip bulk``, ``cn-clip embed`` and clip-retrieval write it.

Shard N is ``img_emb/img_emb_N.npy``, unit vectors float16 or float32 (rows, D), and
``metadata/metadata_N.parquet``, one row for each vector. If there is a folder ``manifests``, a
shard counts only if it has a manifest there, which is written last.

An image has one id for ever, made of its shard and its row there: ``shard * SPAN + row + 1``. So a
part of the shards gives the same ids as all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.arrays import read_npy
from cn_clip.embeddings.files import check_format
from cn_clip.errors import DataError, LibraryError, UsageError
from cn_clip.files import read_file
from cn_clip.outputs import json_object_at
from cn_clip.search.places import is_shard_folder
from cn_clip.text import path_text
from cn_clip.translation import _

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

SPAN = 10**9  # ids of a shard; nine million shards stay below 2^53, the integers of JSON
_MAX_SHARD = (1 << 53) // SPAN
_NAME = re.compile(r"img_emb_(\d{1,9})\.npy")
_MANIFEST = re.compile(r"(\d{1,9})\.json")


def ids_of(shard: int, rows: Rows) -> Rows:
    """Return the ids (N,) of rows (N,) of a shard."""
    return rows + (shard * SPAN + 1)


def shards_and_rows(ids: Rows) -> tuple[Rows, Rows]:
    """Return the shards (N,) and the rows (N,) of ids (N,)."""
    shards, rows = np.divmod(ids - 1, SPAN)
    return shards, rows


@dataclass(frozen=True)
class ShardFolder:
    """The finished shards of a folder.

    Attributes:
        path: of the folder.
        names: shard -> its number as it is written in file names, in order.
        about: the metadata of the embeddings; empty without any.
    """

    path: Path
    names: dict[int, str]
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, shards: range | None = None) -> ShardFolder:
        """List the shards of a folder, or those of them in a range.

        Raises:
            UsageError: there are none.
            DataError: a shard has a manifest, but no file; or the folder is of a newer version.
        """
        if not is_shard_folder(path):
            raise UsageError(
                _(
                    "{path} holds no embedding shards (img_emb/img_emb_0.npy, ...); give a folder "
                    "that cn-clip bulk or cn-clip embed wrote",
                    path=path_text(path),
                )
            )
        about = json_object_at(path / "about.json")
        check_format(about, path / "about.json")
        names = _numbered(path / "img_emb", _NAME)
        if (path / "manifests").is_dir():
            names = _finished(path, names)
        kept = {n: names[n] for n in sorted(names) if shards is None or n in shards}
        if not kept:
            raise UsageError(
                _("{path} holds no finished shard in that range", path=path_text(path))
                if shards is not None and names
                else _("{path} holds no finished shard yet", path=path_text(path))
            )
        return cls(path, kept, about)

    @cached_property
    def numbers(self) -> list[int]:
        """The shards in order."""
        return list(self.names)

    @cached_property
    def dim(self) -> int:
        """Width of a vector."""
        given = self.about.get("dim")
        if type(given) is int and given > 0:
            return given
        shape = read_npy(self.vector_path(self.numbers[0]), mapped=True).shape
        return int(shape[1]) if len(shape) == 2 else 0

    def vector_path(self, shard: int) -> Path:
        """Return the file of the image vectors of a shard."""
        return self.path / "img_emb" / f"img_emb_{self.names[shard]}.npy"

    def text_path(self, shard: int) -> Path:
        """Return the file of the text vectors of a shard; it may not exist."""
        return self.path / "text_emb" / f"text_emb_{self.names[shard]}.npy"

    def metadata_path(self, shard: int) -> Path:
        """Return the file of the metadata of a shard."""
        return self.path / "metadata" / f"metadata_{self.names[shard]}.parquet"

    def vectors(self, shard: int) -> Array:
        """Map the vectors of a shard into memory: float16 or float32 (rows, D).

        Raises:
            DataError: the file is missing or damaged, or of another width.
        """
        return mapped_vectors(self.vector_path(shard), self.dim)


def mapped_vectors(path: Path, dim: int) -> Array:
    """Map a file of vectors into memory: float16 or float32 (rows, dim).

    Raises:
        DataError: the file is missing or damaged, or of another width.
    """
    vectors = read_npy(path, mapped=True)
    if vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32):
        raise DataError(
            _(
                "{path} holds {dtype} of shape {shape}; expected float16 or float32 vectors (N, D)",
                path=path_text(path),
                dtype=vectors.dtype,
                shape=vectors.shape,
            )
        )
    if vectors.shape[1] != dim:
        raise DataError(
            _(
                "{path} holds vectors of {width} values, and other shards of {dim}; they are of "
                "different models",
                path=path_text(path),
                width=vectors.shape[1],
                dim=dim,
            )
        )
    if len(vectors) > SPAN:
        raise DataError(
            _("{path} holds more than {limit:,} vectors", path=path_text(path), limit=SPAN)
        )
    return vectors if vectors.flags.c_contiguous else np.ascontiguousarray(vectors)


def parse_range(text: str) -> range:
    """Return the shards of a text such as ``0:250``: the first one, and the one after the last.

    Raises:
        UsageError: it is no such text.
    """
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(
            _("--shards is {text!r}; give the first shard and the end, such as 0:250", text=text)
        )
    return range(int(match[1]), int(match[2]))


def check_model(folder: ShardFolder, fingerprints: Sequence[str | None], name: str) -> None:
    """Check that a model is the one that embedded a folder.

    Args:
        folder: with a fingerprint in its metadata; without one, nothing is checked.
        fingerprints: of the model, and of the one it is derived from.
        name: of the model.

    Raises:
        LibraryError: it is another one.
    """
    wanted = {folder.about.get("fingerprint"), folder.about.get("derived_from")} - {None}
    if wanted and not wanted & set(fingerprints):
        raise LibraryError(
            _(
                "{path} was embedded by {stored} ({fingerprint:.8}), and {name} is another model; "
                "give --model",
                path=path_text(folder.path),
                stored=folder.about.get("model"),
                fingerprint=str(folder.about.get("fingerprint")),
                name=name,
            )
        )


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, str]:
    """Return number -> digits for the names in a folder that match a pattern."""
    found: dict[int, str] = {}
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError as error:
        raise DataError(
            _("{path} cannot be read: {reason}", path=path_text(folder), reason=error.strerror)
        ) from None
    for name in sorted(names):
        match = pattern.fullmatch(name)
        if match is None or int(match[1]) >= _MAX_SHARD:
            continue
        if int(match[1]) in found:
            raise DataError(
                _(
                    "{path} holds shard {number} twice, under two names; remove one",
                    path=path_text(folder),
                    number=int(match[1]),
                )
            )
        found[int(match[1])] = match[1]
    return found


def _finished(path: Path, names: dict[int, str]) -> dict[int, str]:
    """Return the shards with a manifest, without those that have no rows."""
    kept = {}
    for number, digits in _numbered(path / "manifests", _MANIFEST).items():
        if number in names:
            kept[number] = names[number]
        elif _rows_out(path / "manifests" / f"{digits}.json") != 0:
            raise DataError(
                _(
                    "shard {number} of {path} is finished, but its file is missing; see: cn-clip "
                    "bulk verify",
                    number=number,
                    path=path_text(path),
                )
            )
    return kept


def _rows_out(manifest: Path) -> Any:
    """Return the number of rows in a manifest; None for a damaged one."""
    try:
        values = json.loads(read_file(manifest))
    except (OSError, ValueError, RecursionError):
        return None
    return values.get("rows_out") if isinstance(values, dict) else None

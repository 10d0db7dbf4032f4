"""The vectors and facts of a library for other programs: files, Milvus, PostgreSQL."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cn_clip.data.sources.parquet import import_pyarrow
from cn_clip.embeddings.files import (
    EmbeddingsToWrite,
    claim_embeddings,
    write_clip_retrieval,
    write_npz,
)
from cn_clip.errors import LibraryError, UsageError
from cn_clip.install import install_command
from cn_clip.outputs import claim, own_file
from cn_clip.publish import atomic_file, map_write_errors
from cn_clip.search.export_rows import (
    COMMAND,
    TOGETHER,
    Batch,
    Existing,
    ExportRows,
    OnProgress,
)
from cn_clip.search.folder import LibraryFolder, Snapshot
from cn_clip.search.milvus import to_milvus
from cn_clip.search.pgvector import to_pgvector
from cn_clip.search.roots import display_path
from cn_clip.text import path_text
from cn_clip.translation import _

Target = Literal["clip-retrieval", "npz", "parquet", "milvus", "pgvector"]

_WRITER = b"cn-clip writer"
_TEXTS = ("path", "caption", "text", "taken")  # columns in a database
_NUMBERS = ("width", "height", "bytes")

# Column -> how a row of `_ROWS` gives it.
_FACTS = ("width", "height", "bytes", "taken", "latitude", "longitude", "text", "caption")
_NAMES = ("image_id", "path", "digest", *_FACTS)  # columns
_IDS = (
    "SELECT images.id FROM images WHERE images.files > 0 AND images.id <= ? AND images.id NOT IN "
    "(SELECT image FROM missing WHERE model = ?) AND EXISTS "
    "(SELECT 1 FROM files WHERE files.image = images.id AND files.present) ORDER BY images.id"
)
_ROWS = (
    "SELECT images.id, images.digest, roots.kind, roots.location, files.name, images.width, "
    "images.height, images.bytes, images.taken, images.latitude, images.longitude, images.text, "
    "files.caption FROM images JOIN files ON files.id = (SELECT MIN(id) FROM files "
    "WHERE files.image = images.id AND files.present) JOIN roots ON roots.id = files.root "
    "WHERE images.id BETWEEN ? AND ? ORDER BY images.id"
)


class _Table:
    """The searchable images, whose facts are read when they are needed: 8 bytes for each image."""

    def __init__(self, connection: sqlite3.Connection, snapshot: Snapshot) -> None:
        """Read the ids.

        Args:
            connection: in a read transaction.
            snapshot: of the library.
        """
        self.snapshot, self._connection = snapshot, connection
        found = connection.execute(_IDS, (len(snapshot.vectors), snapshot.model.id))
        self.ids = np.fromiter((image for (image,) in found), np.int64)
        self._last: tuple[tuple[int, int], dict[str, list[Any]]] = ((0, 0), {})

    def __len__(self) -> int:
        return len(self.ids)

    def columns(self, start: int, end: int) -> dict[str, list[Any]]:
        """Return the columns of rows; those of the last ones are kept."""
        if self._last[0] != (start, end):
            self._last = (start, end), self._read(self.ids[start:end])
        return self._last[1]

    def _read(self, ids: npt.NDArray[np.int64]) -> dict[str, list[Any]]:
        wanted = set(ids.tolist())
        columns: dict[str, list[Any]] = {name: [] for name in _NAMES}
        ends = (int(ids[0]), int(ids[-1])) if len(ids) else (0, 0)
        for image, digest, kind, location, name, *facts in self._connection.execute(_ROWS, ends):
            if image not in wanted:
                continue
            values = (image, display_path(kind, location, name), digest.hex(), *facts)
            for column, value in zip(_NAMES, values, strict=True):
                columns[column].append(value)
        return columns

    def vectors(self, start: int, end: int) -> npt.NDArray[np.float32]:
        """Return the unit vectors (end - start, D) of rows."""
        vectors = self.snapshot.vectors[self.ids[start:end] - 1].astype(np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: npt.NDArray[np.float32] = vectors / np.maximum(lengths, 1e-12)
        return unit

    def spans(self) -> Iterator[tuple[int, int]]:
        for start in range(0, len(self), TOGETHER):
            yield start, min(len(self), start + TOGETHER)


@dataclass(frozen=True, slots=True)
class _Column(Sequence[Any]):
    """A column of a table; a slice of it is read from the database."""

    table: _Table
    name: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            start, end, _step = at.indices(len(self))
            return self.table.columns(start, end)[self.name]
        return self.table.columns(at, at + 1)[self.name][0]


def claim_export(library: Path, to: Target, out: str, *, overwrite: bool = False) -> str:
    """Check that an export may be written, without touching anything. Return ``out``.

    Raises:
        UsageError: as ``outputs.claim``; the suffix does not fit; or a package is missing.
    """
    if is_database(to):
        return claim_database(to, out)
    suffix = {"clip-retrieval": "", "npz": ".npz", "parquet": ".parquet"}[to]
    if Path(out).suffix != suffix:
        raise UsageError(
            _(
                "--out {out} does not fit --to {to}; give {wanted}",
                out=out,
                to=to,
                wanted=_("a folder, without a suffix") if not suffix else f"X{suffix}",
            )
        )
    if to == "parquet":
        import_pyarrow("pyarrow")
        check = own_file(COMMAND, _is_own_parquet)
        return os.fspath(claim(out, check, inputs=[library], overwrite=overwrite))
    return os.fspath(claim_embeddings(out, command=COMMAND, inputs=[library], overwrite=overwrite))


def is_database(to: str) -> bool:
    """Return whether a target is a server, and not a file."""
    return to in ("milvus", "pgvector")


def claim_database(to: str, out: str) -> str:
    """Check that a database can be written to, without connecting. Return its address.

    Raises:
        UsageError: a package is missing, or the address is empty.
    """
    package, extra = {"milvus": ("pymilvus", "milvus"), "pgvector": ("psycopg", "pgvector")}[to]
    if find_spec(package) is None:
        raise UsageError(
            _(
                "--to {to} needs {package}, which is not installed: {command}",
                to=to,
                package=package,
                command=install_command(extra),
            )
        )
    if not out.strip():
        raise UsageError(_("--out is empty; give the address of a server, or X.db for milvus-lite"))
    return out


def to_database(
    rows: ExportRows,
    to: str,
    out: str,
    collection: str,
    existing: Existing,
    on_progress: OnProgress,
) -> None:
    """Write rows into a collection of Milvus, or a table of PostgreSQL.

    Raises:
        UsageError: both or neither of what may be done with an existing one; or it is not ours.
        CNClipError: the server does not answer, or refuses.
    """
    if existing.overwrite and existing.update:
        raise UsageError(_("--overwrite and --update are both given; give one of them"))
    write = to_milvus if to == "milvus" else to_pgvector
    write(rows, out, collection, existing, on_progress)


def export(
    library: LibraryFolder,
    to: Target,
    out: str,
    *,
    collection: str = "cn_clip",
    overwrite: bool = False,
    update: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> int:
    """Write the images that a search can find; return their number.

    Args:
        library: only read.
        to: ``clip-retrieval`` (a folder), ``npz``, ``parquet``, ``milvus`` or ``pgvector``.
        out: from ``claim_export``; for a database the address of a server, or a file of
            milvus-lite.
        collection: of Milvus; a table of PostgreSQL.
        overwrite: replace a collection that this function made.
        update: write all rows into a collection that this function made.
        on_progress: called with the number of images so far and in total.

    Raises:
        LibraryError: the library is empty or damaged.
        UsageError: the collection exists.
        CNClipError: the output cannot be written, or the server does not answer.
    """
    snapshot = library.snapshot()
    with library.reading() as connection:  # to the end, so that all rows are of one state
        table = _Table(connection, snapshot)
        if not len(table):
            raise LibraryError(
                _("{library} holds no image to export", library=path_text(library.path))
            )
        if to in ("milvus", "pgvector"):
            rows = _export_rows(table)
            to_database(rows, to, out, collection, Existing(overwrite, update), on_progress)
        elif to == "parquet":
            _to_parquet(table, Path(out), on_progress)
        else:
            with map_write_errors(out):
                _to_embeddings(table, to, Path(out))
    return len(table)


def _export_rows(table: _Table) -> ExportRows:
    def batches() -> Iterator[Batch]:
        for start, end in table.spans():
            columns = table.columns(start, end)
            yield Batch(columns["image_id"], table.vectors(start, end), columns)

    model = table.snapshot.model
    return ExportRows(
        model.name, model.fingerprint, model.dim, len(table), _TEXTS, _NUMBERS, batches
    )


def _to_embeddings(table: _Table, to: Target, out: Path) -> None:
    model = table.snapshot.model
    about = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "kind": "images",
        "dim": model.dim,
        "normalized": True,
        "logit_scale": model.logit_scale,
    }
    columns = {name: _Column(table, name) for name in _NAMES if name != "path"}
    paths = _Column(table, "path")
    embeddings = EmbeddingsToWrite("images", paths, paths, model.dim, table.vectors, about, columns)
    if to == "npz":
        write_npz(embeddings, out)
    else:
        write_clip_retrieval(embeddings, out, command=COMMAND)


def _to_parquet(table: _Table, out: Path, on_progress: OnProgress) -> None:
    """One row for each image; the column ``vector`` is a list of float32."""
    arrow, parquet = import_pyarrow("pyarrow"), import_pyarrow("pyarrow.parquet")
    kinds = {"latitude": arrow.float64(), "longitude": arrow.float64()}
    kinds |= dict.fromkeys(("image_id", "width", "height", "bytes"), arrow.int64())
    model = table.snapshot.model
    schema = arrow.schema(
        [
            *((name, kinds.get(name, arrow.string())) for name in _NAMES),
            ("vector", arrow.list_(arrow.float32(), model.dim)),
        ],
        {
            _WRITER: COMMAND.encode(),
            b"model": model.name.encode(errors="replace"),
            b"fingerprint": model.fingerprint.encode(),
        },
    )
    with map_write_errors(out), atomic_file(out) as path, parquet.ParquetWriter(path, schema) as to:
        for start, end in table.spans():
            vectors = arrow.array(table.vectors(start, end).reshape(-1))
            columns = [
                arrow.array(values, kinds.get(name, arrow.string()))
                for name, values in table.columns(start, end).items()
            ]
            columns.append(arrow.FixedSizeListArray.from_arrays(vectors, model.dim))
            to.write_batch(arrow.record_batch(columns, schema=schema))
            on_progress(end, len(table))


def _is_own_parquet(path: Path) -> bool:
    parquet = import_pyarrow("pyarrow.parquet")
    # pyarrow raises many kinds on files that are no Parquet.
    try:
        metadata = parquet.read_schema(path).metadata or {}
    except Exception:
        return False
    return bool(metadata.get(_WRITER) == COMMAND.encode())

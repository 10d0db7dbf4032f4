"""The vectors and facts of a library for other programs: files, or a Milvus server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cn_clip.embeddings.files import (
    EmbeddingsToWrite,
    claim_embeddings,
    write_clip_retrieval,
    write_npz,
)
from cn_clip.errors import CNClipError, LibraryError, UsageError
from cn_clip.outputs import claim, own_file
from cn_clip.publish import atomic_file, map_write_errors
from cn_clip.search.folder import LibraryFolder, Snapshot
from cn_clip.search.roots import display_path
from cn_clip.text import path_text
from cn_clip.translation import _

Target = Literal["clip-retrieval", "npz", "parquet", "milvus"]
OnProgress = Callable[[int, int | None], None]

_COMMAND = "library export"
_TOGETHER = 1000  # images sent or written together
_TOKEN = "MILVUS_TOKEN"
_WRITER = b"cn-clip writer"
_MILVUS_TEXTS = ("path", "caption", "text", "taken")
_MILVUS_NUMBERS = ("width", "height", "bytes")
_TEXT_BYTES = 60_000  # of a text in Milvus, below its limit of 65,535

# Column -> how a row of `_ROWS` gives it.
_FACTS = ("width", "height", "bytes", "taken", "latitude", "longitude", "text", "caption")
_ROWS = (
    "SELECT images.id, images.digest, roots.kind, roots.location, files.name, images.width, "
    "images.height, images.bytes, images.taken, images.latitude, images.longitude, images.text, "
    "files.caption FROM images JOIN files ON files.id = (SELECT MIN(id) FROM files "
    "WHERE files.image = images.id AND files.present) JOIN roots ON roots.id = files.root "
    "WHERE images.files > 0 AND images.id <= ? AND images.id NOT IN "
    "(SELECT image FROM missing WHERE model = ?) ORDER BY images.id"
)


@dataclass(frozen=True, slots=True)
class _Table:
    """The searchable images: vectors, and columns of the same length."""

    snapshot: Snapshot
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.columns["image_id"])

    def vectors(self, start: int, end: int) -> npt.NDArray[np.float32]:
        """Return the unit vectors (end - start, D) of rows."""
        rows = np.array(self.columns["image_id"][start:end], np.int64) - 1
        vectors = self.snapshot.vectors[rows].astype(np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: npt.NDArray[np.float32] = vectors / np.maximum(lengths, 1e-12)
        return unit

    def spans(self) -> Iterator[tuple[int, int]]:
        for start in range(0, len(self), _TOGETHER):
            yield start, min(len(self), start + _TOGETHER)


def claim_export(library: Path, to: Target, out: str, *, overwrite: bool = False) -> str:
    """Check that an export may be written, without touching anything. Return ``out``.

    Raises:
        UsageError: as ``outputs.claim``; the suffix does not fit; or a package is missing.
    """
    if to == "milvus":
        if find_spec("pymilvus") is None:
            raise UsageError(
                _("--to milvus needs pymilvus, which is not installed: pip install pymilvus")
            )
        if not out.strip():
            raise UsageError(_("--out is empty; give the address of a server, or X.db"))
        return out
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
        _parquet()
        check = own_file(_COMMAND, _is_own_parquet)
        return os.fspath(claim(out, check, inputs=[library], overwrite=overwrite))
    return os.fspath(claim_embeddings(out, command=_COMMAND, inputs=[library], overwrite=overwrite))


def export(
    library: LibraryFolder,
    to: Target,
    out: str,
    *,
    collection: str = "cn_clip",
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> int:
    """Write the images that a search can find; return their number.

    Args:
        library: only read.
        to: ``clip-retrieval`` (a folder), ``npz``, ``parquet``, or ``milvus``.
        out: from ``claim_export``; for Milvus the address of a server, or a file of milvus-lite.
        collection: of Milvus.
        overwrite: replace a collection that this function made.
        on_progress: called with the number of images so far and in total.

    Raises:
        LibraryError: the library is empty or damaged.
        UsageError: the collection exists.
        CNClipError: the output cannot be written, or the server does not answer.
    """
    table = _read(library)
    if to == "milvus":
        _to_milvus(table, out, collection, overwrite, on_progress)
    elif to == "parquet":
        _to_parquet(table, Path(out), on_progress)
    else:
        with map_write_errors(out):
            _to_embeddings(table, to, Path(out))
    return len(table)


def _read(library: LibraryFolder) -> _Table:
    snapshot = library.snapshot()
    names = ("image_id", "path", "digest", *_FACTS)
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for image, digest, kind, location, name, *facts in library.query(
        _ROWS, (len(snapshot.vectors), snapshot.model.id)
    ):
        values = (image, display_path(kind, location, name), digest.hex(), *facts)
        for column, value in zip(names, values, strict=True):
            columns[column].append(value)
    if not columns["image_id"]:
        raise LibraryError(_("{library} holds no image to export", library=path_text(library.path)))
    return _Table(snapshot, columns)


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
    columns = {name: values for name, values in table.columns.items() if name != "path"}
    paths = table.columns["path"]
    embeddings = EmbeddingsToWrite("images", paths, paths, model.dim, table.vectors, about, columns)
    if to == "npz":
        write_npz(embeddings, out)
    else:
        write_clip_retrieval(embeddings, out, command=_COMMAND)


def _to_parquet(table: _Table, out: Path, on_progress: OnProgress) -> None:
    """One row for each image; the column ``vector`` is a list of float32."""
    arrow, parquet = _parquet()
    kinds = {"latitude": arrow.float64(), "longitude": arrow.float64()}
    kinds |= dict.fromkeys(("image_id", "width", "height", "bytes"), arrow.int64())
    model = table.snapshot.model
    schema = arrow.schema(
        [
            *((name, kinds.get(name, arrow.string())) for name in table.columns),
            ("vector", arrow.list_(arrow.float32(), model.dim)),
        ],
        {
            _WRITER: _COMMAND.encode(),
            b"model": model.name.encode(errors="replace"),
            b"fingerprint": model.fingerprint.encode(),
        },
    )
    with map_write_errors(out), atomic_file(out) as path, parquet.ParquetWriter(path, schema) as to:
        for start, end in table.spans():
            vectors = arrow.array(table.vectors(start, end).reshape(-1))
            columns = [
                arrow.array(v[start:end], kinds.get(name, arrow.string()))
                for name, v in table.columns.items()
            ]
            columns.append(arrow.FixedSizeListArray.from_arrays(vectors, model.dim))
            to.write_batch(arrow.record_batch(columns, schema=schema))
            on_progress(end, len(table))


def _to_milvus(
    table: _Table, uri: str, collection: str, overwrite: bool, on_progress: OnProgress
) -> None:
    """A collection with the ids of the library as primary key; searched by inner product.

    A token is read from the environment variable ``MILVUS_TOKEN``.
    """
    pymilvus = import_module("pymilvus")
    kinds, model = pymilvus.DataType, table.snapshot.model
    about = f"cn-clip {_COMMAND}: {model.name} {model.fingerprint}"
    # pymilvus raises MilvusException for most failures, and ValueError, OSError, ConnectionError
    # or grpc.RpcError for others.
    client = None
    try:
        client = pymilvus.MilvusClient(uri, token=os.environ.get(_TOKEN, ""))
        if client.has_collection(collection):
            _check_replaceable(client, collection, overwrite)
            client.drop_collection(collection)
        schema = client.create_schema(description=about)
        schema.add_field("id", kinds.INT64, is_primary=True)
        schema.add_field("vector", kinds.FLOAT_VECTOR, dim=model.dim)
        for name in _MILVUS_TEXTS:
            schema.add_field(name, kinds.VARCHAR, max_length=65_535)
        for name in _MILVUS_NUMBERS:
            schema.add_field(name, kinds.INT64)
        index = client.prepare_index_params()
        index.add_index("vector", index_type="AUTOINDEX", metric_type="IP")
        client.create_collection(collection, schema=schema, index_params=index)
        for start, end in table.spans():
            client.insert(collection, _milvus_rows(table, start, end))
            on_progress(end, len(table))
        client.flush(collection)
        client.load_collection(collection)
    except CNClipError:
        raise
    # Boundary to a third-party client, whose errors have no common base class.
    except Exception as error:
        raise CNClipError(
            _("Milvus at {uri} refused the export: {error}", uri=uri, error=error)
        ) from error
    finally:
        if client is not None:
            client.close()


def _check_replaceable(client: Any, collection: str, overwrite: bool) -> None:
    if not overwrite:
        raise UsageError(
            _(
                "the collection {collection} exists; give another --collection, or --overwrite to "
                "replace it",
                collection=collection,
            )
        )
    about = client.describe_collection(collection)
    # milvus-lite keeps no descriptions.
    names = [field["name"] for field in about.get("fields", ())]
    ours = str(about.get("description")).startswith(f"cn-clip {_COMMAND}")
    if not ours and names != ["id", "vector", *_MILVUS_TEXTS, *_MILVUS_NUMBERS]:
        raise UsageError(
            _(
                "the collection {collection} was not written by `cn-clip {command}`; give another "
                "--collection",
                collection=collection,
                command=_COMMAND,
            )
        )


def _milvus_rows(table: _Table, start: int, end: int) -> list[dict[str, Any]]:
    rows = []
    for row, vector in zip(range(start, end), table.vectors(start, end), strict=True):
        values = {name: column[row] for name, column in table.columns.items()}
        texts = {name: _cut(values[name]) for name in _MILVUS_TEXTS}
        numbers = {name: values[name] for name in _MILVUS_NUMBERS}
        rows.append({"id": values["image_id"], "vector": vector} | texts | numbers)
    return rows


def _cut(text: str | None) -> str:
    return (text or "").encode()[:_TEXT_BYTES].decode(errors="ignore")


def _is_own_parquet(path: Path) -> bool:
    _arrow, parquet = _parquet()
    # pyarrow raises many kinds on files that are no Parquet.
    try:
        metadata = parquet.read_schema(path).metadata or {}
    except Exception:
        return False
    return bool(metadata.get(_WRITER) == _COMMAND.encode())


def _parquet() -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise UsageError(
            _("Parquet files need pyarrow, which is not installed: pip install pyarrow")
        ) from None

"""Rows exported to a collection of Milvus, or of milvus-lite."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from cn_clip.errors import CNClipError, UsageError
from cn_clip.search.export_rows import COMMAND, Batch, Existing, ExportRows, OnProgress, mark
from cn_clip.translation import _

_TOKEN = "MILVUS_TOKEN"
_MAX_TEXT = 65_535


def to_milvus(
    rows: ExportRows, uri: str, collection: str, existing: Existing, on_progress: OnProgress
) -> None:
    """Write rows into a collection with their ids as primary key; searched by inner product.

    A token is read from the environment variable ``MILVUS_TOKEN``.

    Raises:
        UsageError: the collection exists and is not to be changed, or is not ours.
        CNClipError: the server does not answer, or refuses.
    """
    pymilvus = import_module("pymilvus")
    # pymilvus raises MilvusException for most failures, and ValueError, OSError, ConnectionError
    # or grpc.RpcError for others.
    client = None
    try:
        client = pymilvus.MilvusClient(uri, token=os.environ.get(_TOKEN, ""))
        if client.has_collection(collection):
            _check_ours(client, rows, collection, existing)
            if existing.overwrite:
                client.drop_collection(collection)
        if not client.has_collection(collection):
            _create(pymilvus, client, rows, collection)
        done = 0
        for batch in rows.batches():
            client.upsert(collection, _records(rows, batch))
            done += len(batch.ids)
            on_progress(done, rows.count)
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


def _create(pymilvus: Any, client: Any, rows: ExportRows, collection: str) -> None:
    kinds = pymilvus.DataType
    schema = client.create_schema(description=rows.about)
    schema.add_field("id", kinds.INT64, is_primary=True)
    schema.add_field("vector", kinds.FLOAT_VECTOR, dim=rows.dim)
    for name in rows.texts:
        schema.add_field(name, kinds.VARCHAR, max_length=_MAX_TEXT)
    for name in rows.numbers:
        schema.add_field(name, kinds.INT64)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="AUTOINDEX", metric_type="IP")
    client.create_collection(collection, schema=schema, index_params=index)


def _check_ours(client: Any, rows: ExportRows, collection: str, existing: Existing) -> None:
    if not (existing.overwrite or existing.update):
        raise UsageError(
            _(
                "the collection {collection} exists; give another --collection, --update to write "
                "its rows again, or --overwrite to replace it",
                collection=collection,
            )
        )
    about = client.describe_collection(collection)
    # milvus-lite keeps no descriptions.
    fields = about.get("fields", ())
    names = [field["name"] for field in fields]
    ours = str(about.get("description")).startswith(mark())
    if not ours and names != ["id", "vector", *rows.texts, *rows.numbers]:
        raise UsageError(
            _(
                "the collection {collection} was not written by `cn-clip {command}`; give another "
                "--collection",
                collection=collection,
                command=COMMAND,
            )
        )
    described = str(about.get("description"))
    width = next((f["params"].get("dim") for f in fields if f["name"] == "vector"), rows.dim)
    other = int(width) != rows.dim or (described and rows.fingerprint not in described)
    if existing.update and other:
        raise UsageError(
            _(
                "the collection {collection} has vectors of another model; give --overwrite to "
                "replace it",
                collection=collection,
            )
        )


def _records(rows: ExportRows, batch: Batch) -> list[dict[str, Any]]:
    return [
        {"id": image, "vector": vector}
        | {name: batch.text(name, row) for name in rows.texts}
        | {name: batch.columns[name][row] for name in rows.numbers}
        for row, (image, vector) in enumerate(zip(batch.ids, batch.vectors, strict=True))
    ]

"""Embedding shards written into a vector database, each image under its id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cn_clip.search.export import to_database
from cn_clip.search.export_rows import TOGETHER, Batch, Existing, ExportRows, OnProgress
from cn_clip.shards.folder import ShardFolder, ids_of
from cn_clip.shards.metadata import check_rows, facts_in_batches
from cn_clip.shards.training import has_direction

_TEXTS = ("path", "caption")


def export_shards(
    path: Path, to: str, out: str, collection: str, existing: Existing, on_progress: OnProgress
) -> int:
    """Write all images of a folder; return their number. Those without a direction are left out.

    Raises:
        UsageError: as ``to_database``; or there is no shard.
        DataError: a shard is damaged.
        CNClipError: the server does not answer, or refuses.
    """
    folder = ShardFolder.open(path)
    count = sum(len(folder.vectors(shard)) for shard in folder.numbers)
    rows = ExportRows(
        str(folder.about.get("model")),
        str(folder.about.get("fingerprint")),
        folder.dim,
        count,
        _TEXTS,
        (),
        lambda: _batches(folder),
    )
    to_database(rows, to, out, collection, existing, on_progress)
    return count


def _batches(folder: ShardFolder) -> Iterator[Batch]:
    for shard in folder.numbers:
        vectors = folder.vectors(shard)
        for number, facts in enumerate(facts_in_batches(folder, shard, TOGETHER)):
            at = number * TOGETHER
            stored = vectors[at : at + len(facts)]
            check_rows(folder, shard, len(stored) == len(facts))
            valid = np.flatnonzero(has_direction(stored))
            rows = stored[valid].astype(np.float32)
            columns: dict[str, list[str | None]] = {
                "path": [facts[row].path for row in valid.tolist()],
                "caption": [facts[row].caption for row in valid.tolist()],
            }
            unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            yield Batch(ids_of(shard, valid + at).tolist(), unit, columns)

"""Embeddings on disk: ``.npz``, clip-retrieval's folders, and the official feature JSONL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.errors import UsageError
from cn_clip.inputs import Kind
from cn_clip.publish import published, published_folder

_ROWS_PER_FILE = 100_000


@dataclass(frozen=True, slots=True)
class Features:
    """Rows to write: ``ids`` and ``labels`` (a path or the text) in order, and their vectors.

    ``rows(start, end)`` returns the embeddings float32 (end - start, dim). ``about`` is stated in
    the output: the model, its fingerprint, and that the vectors are of unit length.
    """

    kind: Kind
    ids: list[str | int]
    labels: list[str]
    dim: int
    rows: Callable[[int, int], npt.NDArray[np.float32]]
    about: dict[str, Any]


def writer_of(out: Path) -> Callable[[Features, Path], None]:
    """Return the function that writes ``out``, by its suffix: ``.npz``, ``.jsonl``, or a folder.

    Raises:
        UsageError: the suffix is of no known format, or a library for it is missing.
    """
    if out.suffix == ".npz":
        return write_npz
    if out.suffix == ".jsonl":
        return write_jsonl
    if out.suffix:
        raise UsageError(
            f"--out {out}: give .npz, .jsonl (official features), or a folder (clip-retrieval's "
            "layout)"
        )
    _parquet()
    return write_clip_retrieval


def write_npz(features: Features, out: Path) -> None:
    """Write ``embeddings`` float32 (N, D), ``ids`` (N,), and ``about`` (JSON), all or nothing."""
    ids: npt.NDArray[Any] = np.array(features.ids)
    if ids.dtype.kind == "U" or any(isinstance(each, str) for each in features.ids):
        ids = np.array([str(each) for each in features.ids], dtype=np.str_)
    about = np.array(json.dumps(features.about, ensure_ascii=False))
    with published(out) as path, path.open("wb") as stream:
        rows = features.rows(0, len(features.ids))
        np.savez(stream, embeddings=rows, ids=ids, about=about)


def write_jsonl(features: Features, out: Path) -> None:
    """Write the official ``{"image_id": ..., "feature": [...]}`` lines, or ``text_id``, and what
    they are into ``OUT.about.json``."""
    key = {"images": "image_id", "texts": "text_id"}[features.kind]
    with published(out) as path, path.open("w", encoding="utf-8") as stream:
        for start, end in _spans(len(features.ids), 1000):
            rows = features.rows(start, end).tolist()
            for name, row in zip(features.ids[start:end], rows, strict=True):
                stream.write(json.dumps({key: name, "feature": row}, ensure_ascii=False) + "\n")
    with published(out.with_name(f"{out.name}.about.json")) as path:
        _write_about(features, path)


def write_clip_retrieval(features: Features, out: Path) -> None:
    """Write ``img_emb/img_emb_0.npy`` (or ``text_emb/...``) and ``metadata/metadata_0.parquet``
    beside ``about.json``, a pair of files for every 100,000 rows, all or nothing."""
    arrow, parquet = _parquet()
    stem, column = {
        "images": ("img_emb", "image_path"),
        "texts": ("text_emb", "caption"),
    }[features.kind]
    with published_folder(out) as folder:
        (folder / stem).mkdir()
        (folder / "metadata").mkdir()
        for part, (start, end) in enumerate(_spans(len(features.ids), _ROWS_PER_FILE)):
            np.save(folder / stem / f"{stem}_{part}.npy", features.rows(start, end))
            table = {
                "id": [str(each) for each in features.ids[start:end]],
                column: features.labels[start:end],
            }
            parquet.write_table(
                arrow.table(table), folder / "metadata" / f"metadata_{part}.parquet"
            )
        _write_about(features, folder / "about.json")


def _spans(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, max(1, count), size):
        yield start, min(count, start + size)


def _write_about(features: Features, path: Path) -> None:
    text = json.dumps(features.about, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def _parquet() -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise UsageError(
            "clip-retrieval's layout needs pyarrow: pip install pyarrow, or give --out X.npz"
        ) from None

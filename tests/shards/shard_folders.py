"""Folders of embedding shards for tests, as ``cn-clip bulk`` writes them."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from cn_clip.shards.folder import SPAN


def use_one_thread(monkeypatch) -> None:
    """Let faiss use one thread, as its threads wait for each other on a busy machine."""
    from cn_clip.shards import building, training

    for module in (building, training):
        monkeypatch.setattr(module, "usable_cpus", lambda: 1)


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def clustered(count: int, dim: int = 32, seed: int = 0) -> np.ndarray:
    """Unit vectors around a few centres, as those of images are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(24, dim))
    return unit(centres[rng.integers(24, size=count)] + 0.6 * rng.normal(size=(count, dim)))


def write_shard(folder: Path, number: int, vectors, *, dtype=np.float16, **columns) -> None:
    """Write one shard; its columns are ``image_path`` and others, by default names."""
    for name in ("img_emb", "metadata", "manifests"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    texts = columns.pop("text_emb", None)
    if texts is not None:
        (folder / "text_emb").mkdir(exist_ok=True)
        np.save(folder / "text_emb" / f"text_emb_{number:05d}.npy", np.asarray(texts, dtype))
    np.save(folder / "img_emb" / f"img_emb_{number:05d}.npy", np.asarray(vectors, dtype))
    names = [f"{number}-{row}.jpg" for row in range(len(vectors))]
    table = {"id": names, "image_path": names, "caption": [f"图{name}" for name in names]} | columns
    pyarrow.parquet.write_table(
        pyarrow.table(table), folder / "metadata" / f"metadata_{number:05d}.parquet"
    )
    (folder / "manifests" / f"{number:05d}.json").write_text(
        json.dumps({"shard": number, "rows_out": len(vectors)})
    )


def write_shards(folder: Path, vectors, of: int, *, about=None, **options) -> Path:
    """Write vectors in shards of so many rows; every second one in float32."""
    for number, at in enumerate(range(0, len(vectors), of)):
        columns = {name: values[at : at + of] for name, values in options.items()}
        dtype = np.float32 if number % 2 else np.float16
        write_shard(folder, number, vectors[at : at + of], dtype=dtype, **columns)
    about = {"kind": "images", "dim": vectors.shape[1], "normalized": True} | (about or {})
    (folder / "about.json").write_text(json.dumps(about))
    return folder


def ids(count: int, of: int) -> np.ndarray:
    """The ids of the rows of ``write_shards``."""
    rows = np.arange(count)
    return rows // of * SPAN + rows % of + 1


def best_ids(vectors, queries, k: int, of: int) -> np.ndarray:
    """The ids of the best rows by float64, as the shards store them; ties by id."""
    stored = [
        block.astype(np.float32 if number % 2 else np.float16).astype(np.float64)
        for number, block in enumerate(np.split(vectors, range(of, len(vectors), of)))
    ]
    scores = np.asarray(queries, np.float64) @ np.concatenate(stored).T
    return ids(len(vectors), of)[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


def image_shards(folder: Path, model: Path, count: int = 24, of: int = 3) -> Path:
    """Write images, and the shards of their embeddings by a model."""
    from conftest import make_image

    import cn_clip

    photos = folder / "photos"
    photos.mkdir(parents=True)
    paths = [photos / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        make_image(number, (40, 40)).save(path)
    embedder = cn_clip.load(str(model), device="cpu")
    vectors = embedder.embed_images(paths)
    about = {"model": str(model), "fingerprint": embedder.fingerprint}
    shards = folder / "shards"
    return write_shards(shards, vectors, of, about=about, image_path=[str(path) for path in paths])

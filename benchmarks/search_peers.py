"""Vector search beside other stores: the same 100,000 vectors and text queries in one run.

    python -m venv PEERS
    PEERS/bin/pip install apsw autofaiss lancedb milvus-lite pymilvus sqlite-vec usearch
    python benchmarks/search_peers.py --peer PEERS/bin/python

Vectors are drawn by `embedding_generator.py`. Each contestant writes its store in a process of its
own; in new ones, a round each in turn, it opens the store and answers queries one by one. `first`
counts from opening to the first result, after the imports; `query` is the median of the others.
`memory` is the resident memory that opening and searching add; of ours most is the mapped vector
file. Medians of the rounds count. Recall is of the 10 best rows by float64. Where a setting trades
recall for time, it is the smallest of a few that reaches recall 0.98, else the largest.

clip-retrieval's back end is `faiss.read_index` and `index.search` of the index that autofaiss
builds with the settings of `clip_index`; both are called here without its web server. The others
are used as their guides say for this size, by cosine or inner product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

K, SAMPLE = 10, 256
Search = Callable[[np.ndarray], Any]  # one query (D,) -> rows


class Store:
    """One contestant; ``levels`` are the values of its setting, ascending."""

    levels: tuple[int, ...] = (0,)

    def build(self, vectors: np.ndarray, folder: Path, sample: np.ndarray) -> None:
        raise NotImplementedError

    def open(self, folder: Path, level: int) -> Search:
        raise NotImplementedError


class OursExact(Store):
    def build(self, vectors: np.ndarray, folder: Path, sample: np.ndarray) -> None:
        from cn_clip.search.codes import Codes

        vectors.astype(np.float16).tofile(folder / "vectors.f16")
        Codes.update(folder / "cache", vectors.astype(np.float16))

    def open(self, folder: Path, level: int) -> Search:
        from cn_clip.search.vectors import search_vectors

        dim = int((folder / "dim").read_text())
        vectors = np.memmap(folder / "vectors.f16", np.float16, "r").reshape(-1, dim)
        return lambda query: search_vectors(
            vectors, query[None], K, cache=folder / "cache"
        ).indexes[0]


class OursIndex(OursExact):
    def build(self, vectors: np.ndarray, folder: Path, sample: np.ndarray) -> None:
        from cn_clip.search.ann import AnnIndex

        vectors.astype(np.float16).tofile(folder / "vectors.f16")
        AnnIndex.build(vectors.astype(np.float16), folder / "cache", sample)

    def open(self, folder: Path, level: int) -> Search:
        from cn_clip.search import vectors

        vectors.ANN_ROWS = 1
        return super().open(folder, level)


class ClipRetrieval(Store):
    levels = (16, 32, 64, 128, 256, 512, 1024, 2048)

    def build(self, vectors: np.ndarray, folder: Path, sample: np.ndarray) -> None:
        from autofaiss import build_index

        try:
            build_index(
                embeddings=vectors,
                index_path=str(folder / "image.index"),
                index_infos_path=str(folder / "image.json"),
                max_index_memory_usage="4G",
                current_memory_available="16G",
            )
        except TypeError:  # 2.18 fails to write the JSON file beside the finished index
            if not (folder / "image.index").exists():
                raise

    def open(self, folder: Path, level: int) -> Search:
        import faiss

        index = faiss.read_index(str(folder / "image.index"))
        faiss.ParameterSpace().set_index_parameter(index, "efSearch", level)
        return lambda query: index.search(query[None], K)[1][0]


class LanceDB(Store):
    levels: tuple[int, ...] = (0, 8, 16, 32, 64, 128, 256)  # nprobes; 0 is without an index
    indexed = True

    def build(self, vectors: np.ndarray, folder: Path, sample: np.ndarray) -> None:
        import lancedb
        import pyarrow as pa

        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        table = pa.table({"id": pa.array(np.arange(len(vectors))), "vector": values})
        images = lancedb.connect(folder).create_table("images", table)
        if self.indexed:
            images.create_index(metric="cosine", vector_column_name="vector")

    def open(self, folder: Path, level: int) -> Search:
        import lancedb

        table = lancedb.connect(folder).open_table("images")

        def search(query: np.ndarray) -> list[int]:
            found = table.search(query).distance_type("cosine").select(["id"]).limit(K)
            found = found.nprobes(level).refine_factor(10) if level else found.bypass_vector_index()
            return found.to_arrow()["id"].to_pylist()

        return search


class LanceDBExact(LanceDB):
    levels, indexed = (0,), False


class LanceDBIndex(LanceDB):
    levels = LanceDB.levels[1:]


class Milvus(Store):
    levels = (16, 32, 64, 128, 256, 512, 1024)

    def build(self, vectors: np.ndarray, folder: Path, sample: np.ndarray) -> None:
        from pymilvus import DataType, MilvusClient

        client = MilvusClient(str(folder / "milvus.db"))
        schema = client.create_schema(auto_id=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
        index = client.prepare_index_params()
        index.add_index(
            "vector",
            index_type="HNSW",
            metric_type="COSINE",
            params={"M": 32, "efConstruction": 128},
        )
        client.create_collection("images", schema=schema, index_params=index)
        for start in range(0, len(vectors), 5000):
            rows = vectors[start : start + 5000].tolist()
            client.insert("images", [{"id": start + i, "vector": v} for i, v in enumerate(rows)])
        client.flush("images")
        client.close()

    def open(self, folder: Path, level: int) -> Search:
        from pymilvus import MilvusClient

        client = MilvusClient(str(folder / "milvus.db"))
        client.load_collection("images")
        parameters = {"metric_type": "COSINE", "params": {"ef": level}}

        def search(query: np.ndarray) -> list[int]:
            (hits,) = client.search("images", [query.tolist()], limit=K, search_params=parameters)
            return [hit["id"] for hit in hits]

        return search


class SqliteVec(Store):
    def build(self, vectors: np.ndarray, folder: Path, sample: np.ndarray) -> None:
        database = self._connect(folder)
        database.execute(
            "create virtual table images using "
            f"vec0(vector float[{vectors.shape[1]}] distance_metric=cosine)"
        )
        rows = ((row + 1, vector.tobytes()) for row, vector in enumerate(vectors))
        with database:
            database.executemany("insert into images(rowid, vector) values (?, ?)", rows)

    def open(self, folder: Path, level: int) -> Search:
        database = self._connect(folder)
        statement = "select rowid from images where vector match ? and k = ? order by distance"
        return lambda query: [
            row - 1 for (row,) in database.execute(statement, (query.tobytes(), K))
        ]

    def _connect(self, folder: Path) -> Any:
        import apsw  # many a Python's sqlite3 loads no extensions
        import sqlite_vec

        database = apsw.Connection(str(folder / "vectors.db"))
        database.enable_load_extension(True)
        database.load_extension(sqlite_vec.loadable_path())
        return database


class USearch(Store):
    levels = (16, 32, 64, 128, 256, 512, 1024, 2048)

    def build(self, vectors: np.ndarray, folder: Path, sample: np.ndarray) -> None:
        from usearch.index import Index

        index = Index(ndim=vectors.shape[1], metric="cos", dtype="f16")
        index.add(np.arange(len(vectors)), vectors)
        index.save(str(folder / "usearch.index"))

    def open(self, folder: Path, level: int) -> Search:
        from usearch.index import Index

        index = Index.restore(str(folder / "usearch.index"), view=True)
        index.expansion_search = level
        return lambda query: index.search(query, K).keys


STORES: dict[str, type[Store]] = {
    "ours, exact (int8 codes)": OursExact,
    "ours, index (faiss IVF, SQ8)": OursIndex,
    "clip-retrieval (autofaiss)": ClipRetrieval,
    "lancedb, no index": LanceDBExact,
    "lancedb, IVF_PQ": LanceDBIndex,
    "milvus-lite, HNSW": Milvus,
    "sqlite-vec": SqliteVec,
    "usearch, float16": USearch,
}


def resident_mb(kind: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) / 1024
    return float("nan")


def build(name: str, data: Path, folder: Path) -> dict[str, float]:
    vectors = np.load(data / "images.npy").astype(np.float32)
    (folder / "dim").write_text(str(vectors.shape[1]))
    start = time.perf_counter()
    STORES[name]().build(vectors, folder, np.load(data / "sample.npy"))
    seconds = time.perf_counter() - start
    return {"build": seconds}


def search(name: str, data: Path, folder: Path, level: int | None) -> dict[str, float]:
    """Answer the queries; if no level is given, at the lowest that reaches recall 0.98."""
    store, queries = STORES[name](), np.load(data / "queries.npy")
    best = np.load(data / "best.npy")
    if level is None:
        for level in store.levels:
            find = store.open(folder, level)
            found = [find(query) for query in queries]
            reached = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, best)])  # noqa: B905
            if reached >= 0.98:
                break
        return {"level": level, "recall": float(reached)}
    warm_imports(name)
    before = {kind: resident_mb(kind) for kind in ("VmRSS", "RssAnon")}
    start = time.perf_counter()
    find = store.open(folder, level)
    find(queries[0])
    first = time.perf_counter() - start
    times = []
    for query in queries[1:]:
        start = time.perf_counter()
        find(query)
        times.append(time.perf_counter() - start)
    grown = {kind: resident_mb(kind) - value for kind, value in before.items()}
    return {"first": 1000 * first, "query": 1000 * statistics.median(times)} | grown


def warm_imports(name: str) -> None:
    """Import what a contestant imports, so that it is not counted."""
    modules = {
        "ours": ("cn_clip.search.vectors", "numkong", "faiss"),
        "clip": ("faiss",),
        "lanc": ("lancedb", "pyarrow"),
        "milv": ("pymilvus", "milvus_lite"),
        "sqli": ("apsw", "sqlite_vec"),
        "usea": ("usearch.index",),
    }
    for module in modules[name[:4]]:
        __import__(module)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", default=sys.executable, help="a Python with the other stores")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="comma-separated starts of names")
    parser.add_argument("--folder", type=Path, help="where the stores are written; temporary")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task, name, data, folder, *level = options.task
        if task == "build":
            result = build(name, Path(data), Path(folder))
        else:
            result = search(name, Path(data), Path(folder), int(level[0]) if level else None)
        print("\n" + json.dumps(result))
        return
    from embedding_generator import Generator

    from cn_clip.bench import processor_name
    from cn_clip.processes import usable_cpus

    print(f"{options.rows:,} x {options.dim}; {processor_name()}, {usable_cpus()} CPUs")
    names = [
        name
        for name in STORES
        if not options.only or name.startswith(tuple(options.only.split(",")))
    ]
    results: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        data = Path(scratch)
        generator = Generator(dim=options.dim)
        images, queries = generator.images(options.rows), generator.queries(200, seed=2)
        scores = queries.astype(np.float64) @ images.astype(np.float64).T
        np.save(data / "images.npy", images)
        np.save(data / "queries.npy", queries)
        np.save(data / "sample.npy", generator.queries(SAMPLE, seed=1))
        np.save(data / "best.npy", np.argsort(-scores, axis=1, kind="stable")[:, :K])
        del images, scores

        def run(name: str, task: str, *level: str) -> bool:
            folder = data / name.replace(" ", "-")
            folder.mkdir(exist_ok=True)
            python = sys.executable if name.startswith("ours") else options.peer
            words = [python, __file__, "--task", task, name, data, folder, *level]
            done = subprocess.run([*map(str, words)], capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip() or "no message").splitlines()[-1]
                print(f"{name}: {task} failed: {last}", flush=True)
                results.pop(name, None)
                return False
            print(f"{name}: {task} {done.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
            for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                results.setdefault(name, {}).setdefault(key, []).append(value)
            return True

        names = [name for name in names if run(name, "build") and run(name, "tune")]
        for name in names:
            size = sum(f.stat().st_size for f in (data / name.replace(" ", "-")).rglob("*"))
            results[name]["disk"] = [size / 1e6]
        for _round in range(options.rounds):
            names = [
                name for name in names if run(name, "search", str(int(results[name]["level"][0])))
            ]
    print(
        f"{'':<30}{'query ms':>9}{'first ms':>9}{'recall':>8}{'memory MiB':>11}{'anonymous':>10}"
        f"{'disk MB':>9}{'build s':>9}{'setting':>9}"
    )
    for name in names:
        row = {key: statistics.median(values) for key, values in results[name].items()}
        print(
            f"{name:<30}{row['query']:>9.2f}{row['first']:>9.1f}{row['recall']:>8.3f}"
            f"{row['VmRSS']:>11,.0f}{row['RssAnon']:>10,.0f}{row['disk']:>9,.0f}{row['build']:>9.1f}"
            f"{int(row['level']) or '':>9}"
        )


if __name__ == "__main__":
    main()

"""An index over embedding shards: time and memory to build and to search it, and its recall.

    python benchmarks/search_shards.py --folder DIR                      # 10,000,000 x 384
    python benchmarks/search_shards.py --folder DIR --rows 1000000 --codes int8 int4 pq

Images and text queries are drawn by `embedding_generator.py`, into shards of 10,000 as
`cn-clip bulk` writes them. What is in DIR is used again, and each step continues after an
interruption: `--step draw`, `build`, `measure` run one. Delete DIR afterwards.

Memory is the highest sum, over this process and its workers, of the pages that are theirs
(anonymous ones), and of those with the mapped files (the resident set), sampled ten times a second.
Recall is of the 10 best rows, found exactly, of queries that the index was not tuned for. Queries
are run one by one, each once. "Vectors not cached" drops all shards from the page cache before
every query, so that each row that is scored exactly is read from the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from embedding_generator import Generator

from cn_clip.bench import processor_name
from cn_clip.processes import usable_cpus
from cn_clip.search.kernels import float32_of
from cn_clip.shards.building import Options, build_index
from cn_clip.shards.encoding import Best
from cn_clip.shards.folder import ShardFolder, ids_of
from cn_clip.shards.index import INDEX, ShardIndex

SHARD_ROWS = 10_000
TUNED, QUERIES, COLD = 256, 100, 50
K = 10


class Memory:
    """The highest memory of this process and its children while it is entered, in GB."""

    def __enter__(self) -> Memory:
        self.own = self.resident = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_unused: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            sizes = [self._sizes(pid) for pid in self._tree()]
            self.own = max(self.own, sum(own for own, _all in sizes))
            self.resident = max(self.resident, sum(size for _own, size in sizes))

    def _tree(self) -> list[int]:
        found = [os.getpid()]
        for pid in found:  # it grows
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                try:
                    found += map(int, task.read_text().split())
                except OSError:
                    continue
        return found

    @staticmethod
    def _sizes(pid: int) -> tuple[float, float]:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return 0.0, 0.0
        values = dict(line.split(":", 1) for line in lines if line.startswith(("Rss", "VmRSS")))
        numbers = {name: int(value.split()[0]) / 1e6 for name, value in values.items()}
        return numbers.get("RssAnon", 0.0), numbers.get("VmRSS", 0.0)


def draw_shard(folder: Path, number: int, rows: int, dim: int) -> None:
    path = folder / "img_emb" / f"img_emb_{number:05d}.npy"
    if not path.exists():
        part = path.with_suffix(".part")
        with part.open("wb") as stream:
            np.save(stream, Generator(dim=dim).images(rows, seed=number))
        part.rename(path)


def draw(folder: Path, rows: int, dim: int) -> None:
    (folder / "img_emb").mkdir(parents=True, exist_ok=True)
    counts = [min(SHARD_ROWS, rows - at) for at in range(0, rows, SHARD_ROWS)]
    with ProcessPoolExecutor(usable_cpus()) as pool:
        for future in [
            pool.submit(draw_shard, folder, n, count, dim) for n, count in enumerate(counts)
        ]:
            future.result()


def build(folder: Path, dim: int, codes: str, lists: int | None) -> None:
    texts = Generator(dim=dim).queries(TUNED, seed=1)
    begin, first = time.perf_counter(), []

    def show(done: int, total: int | None) -> None:
        if not first:
            first.append(done)
            print(f"  {time.perf_counter() - begin:.0f} s to list the shards and train", flush=True)

    with Memory() as memory:
        done = build_index(
            folder,
            lambda: texts,
            Options(codes=codes, lists=lists, workers=usable_cpus()),
            on_progress=show,
        )
    seconds = time.perf_counter() - begin
    print(
        f"  {codes}: {done.rows:,} rows of {done.shards:,} shards in {done.lists:,} lists, "
        f"{done.encoded} of {done.parts} parts made now; {seconds:.0f} s; "
        f"{done.bytes / done.rows:.0f} bytes a row, {done.bytes / 1e9:.2f} GB; "
        f"memory {memory.own:.2f} GB, {memory.resident:.2f} GB with mapped files; tuned: "
        f"{done.probes} lists, {done.candidates} candidates, recall {done.recall}",
        flush=True,
    )


def exact_part(folder: ShardFolder, queries: np.ndarray) -> Best:
    best = Best.none(len(queries))
    for shard in folder.numbers:
        vectors = float32_of(np.asarray(folder.vectors(shard)))
        ids = ids_of(shard, np.arange(len(vectors)))
        best.update(ids, vectors @ queries.T, ids)
    return best


def exact(folder: ShardFolder, queries: np.ndarray, cache: Path) -> np.ndarray:
    """Return the ids of the best rows (Q, 10), which are found once and kept."""
    if not cache.exists():
        parts = [folder.with_shards(part.tolist()) for part in np.array_split(folder.numbers, 8)]
        best = Best.none(len(queries))
        with ProcessPoolExecutor(usable_cpus()) as pool:
            for more in pool.map(exact_part, parts, [queries] * len(parts)):
                best.keep(
                    np.concatenate([best.ids, more.ids], axis=1),
                    np.concatenate([best.scores, more.scores], axis=1),
                    np.concatenate([best.lists, more.lists], axis=1),
                )
        np.save(cache, best.ids)
    return np.load(cache)


def drop(folder: ShardFolder) -> None:
    """Drop the shards from the page cache."""
    for shard in folder.numbers:
        handle = os.open(folder.vector_path(shard), os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def timed(index: ShardIndex, queries: np.ndarray, cold: bool) -> np.ndarray:
    times = []
    for at in range(len(queries)):
        if cold:
            drop(index.folder)
        start = time.perf_counter()
        index.search(queries[at : at + 1], K)
        times.append(1000 * (time.perf_counter() - start))
    return np.array(times)


def measure(folder: Path, dim: int) -> None:
    queries = Generator(dim=dim).queries(QUERIES, seed=2)
    shards = ShardFolder.open(folder)
    start = time.perf_counter()
    best = exact(shards, queries, folder / "best.npy")
    print(f"  exact search of {QUERIES} queries: {time.perf_counter() - start:.0f} s")
    with Memory() as memory:
        start = time.perf_counter()
        index = ShardIndex.open(folder)
        opening = time.perf_counter() - start
        found = [index.search(query[None], K).indexes[0] for query in queries]
        hits = [len(np.intersect1d(a, b)) / K for a, b in zip(found, best, strict=True)]
        times = {
            "one thread": timed(index, queries, False),
            "vectors not cached": timed(index, queries[:COLD], True),
        }
    print(
        f"  recall@10 of {QUERIES} other queries {np.mean(hits):.4f} "
        f"(standard error {np.std(hits) / np.sqrt(len(hits)):.4f}); opened in {opening:.2f} s; "
        f"memory {memory.own:.2f} GB, {memory.resident:.2f} GB with mapped files"
    )
    for name, some in times.items():
        low, middle, high = np.percentile(some, (10, 50, 95))
        print(
            f"  one query, {name:<20}{middle:8.1f} ms, 10 % {low:.1f}, 95 % {high:.1f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the shards and the index")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--codes", nargs="+", default=["int4"], choices=["int8", "int4", "pq"])
    parser.add_argument("--lists", type=int)
    parser.add_argument("--step", choices=["draw", "build", "measure"])
    options = parser.parse_args()
    cpus = usable_cpus()
    load = os.getloadavg()[0]
    print(f"{options.rows:,} x {options.dim}; {processor_name()}, {cpus} CPUs, load {load:.1f}")
    if options.step in (None, "draw"):
        draw(options.folder, options.rows, options.dim)
    for codes in options.codes:
        if options.step in (None, "build"):
            if len(options.codes) > 1:
                shutil.rmtree(options.folder / INDEX, ignore_errors=True)
            build(options.folder, options.dim, codes, options.lists)
        if options.step in (None, "measure"):
            measure(options.folder, options.dim)


if __name__ == "__main__":
    main()

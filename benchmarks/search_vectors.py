"""Vector search beside the time to read memory: exact, int8 codes, the index, filters.

    python benchmarks/search_vectors.py                    # 1,000,000 x 512
    python benchmarks/search_vectors.py --libraries        # beside simsimd, numpy, faiss's others

Images and text queries are drawn by `embedding_generator.py`. The floor is the sum of the same
bytes as uint64 by as many threads. What is compared is run in turn, a query each, after a
first round that is not counted; medians count. On a machine that does other work too, the lowest
times say more about the method. Recall is of the 10 best rows by float64.
`--libraries` needs simsimd. The graph is searched as widely as reaches the recall of our index.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
from embedding_generator import Generator

from cn_clip.bench import processor_name
from cn_clip.processes import usable_cpus
from cn_clip.search import exact, kernels
from cn_clip.search.ann import FILE, AnnIndex
from cn_clip.search.codes import Codes
from cn_clip.search.exact import search_exact
from cn_clip.search.vectors import search_vectors

K, SAMPLE = 10, 256
Contest = dict[str, Callable[[int], object]]


def draw(folder: Path, rows: int, dim: int) -> np.ndarray:
    """Write drawn images into a file, unless it is there; return it mapped into memory."""
    path = folder / f"vectors-{rows}x{dim}.f16"
    if not path.exists():
        generator = Generator(dim=dim)
        with path.with_suffix(".part").open("wb") as stream:
            for number, start in enumerate(range(0, rows, 100_000)):
                stream.write(generator.images(min(100_000, rows - start), seed=number))
        path.with_suffix(".part").rename(path)
    return np.memmap(path, np.float16, "r", shape=(rows, dim))


def read_floor(array: np.ndarray, threads: int) -> Callable[[int], object]:
    """Return a function that sums an array as uint64, a contiguous part per thread."""
    parts = np.array_split(array.reshape(-1).view(np.uint64), threads)

    def read(_round: int) -> int:
        with ThreadPoolExecutor(threads) as pool:
            return sum(int(part) for part in pool.map(np.sum, parts))

    return read


def measured(contest: Contest, rounds: int) -> dict[str, np.ndarray]:
    """Return the times of each in milliseconds, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in contest}
    for number in range(rounds + 1):
        for name, run in contest.items():
            start = time.perf_counter()
            run(number)
            if number:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: np.array(some) for name, some in times.items()}


def medians(contest: Contest, rounds: int) -> dict[str, float]:
    return {name: float(np.median(some)) for name, some in measured(contest, rounds).items()}


def oracle(vectors: np.ndarray, query: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """Return the 10 best rows by float64."""
    scores = np.concatenate(
        [
            vectors[at : at + (1 << 14)].astype(np.float64) @ query.astype(np.float64)
            for at in range(0, len(vectors), 1 << 14)
        ]
    )
    if allowed is not None:
        scores[~allowed] = -np.inf
    return np.argsort(-scores, kind="stable")[:K]


def recall(found: np.ndarray, best: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, best, strict=True)]))


def show(times: dict[str, np.ndarray], floor: np.ndarray) -> None:
    """Print medians and lowest times, each beside that of the floor."""
    for name, some in times.items():
        middle, lowest = np.median(some), some.min()
        print(
            f"  {name:<34}{middle:>8.2f} ms ({middle / np.median(floor):.2f} x the floor); lowest "
            f"{lowest:.2f} ms ({lowest / floor.min():.2f} x)",
            flush=True,
        )


def library_scans(vectors: np.ndarray, queries: np.ndarray, threads: int) -> Contest:
    """Return scans of one query by other libraries."""
    import faiss
    import simsimd

    faiss.omp_set_num_threads(threads)
    flat = faiss.IndexScalarQuantizer(
        vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    flat.is_trained = True
    for at in range(0, len(vectors), 1 << 16):
        flat.add(vectors[at : at + (1 << 16)].astype(np.float32))
    plain = vectors.view(np.ndarray)

    def by_simsimd(number: int) -> object:
        query = queries[number : number + 1].astype(np.float16)
        parts = np.array_split(plain, threads * 16)
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda part: np.asarray(simsimd.cdist(query, part, "dot")), parts)
            return np.argpartition(np.concatenate(list(found), axis=1)[0], -K)[-K:]

    def by_numpy(number: int) -> object:
        with mock.patch.object(kernels, "has_numkong", lambda: False):
            return search_exact(vectors, queries[number : number + 1], K, threads=threads)

    return {
        "faiss, QT_fp16 flat": lambda number: flat.search(queries[number : number + 1], K),
        "simsimd, same threads": by_simsimd,
        "ours without numkong (numpy)": by_numpy,
    }


def measure_exact(
    vectors: np.ndarray, queries: np.ndarray, folder: Path, rounds: int, libraries: bool
) -> None:
    threads = usable_cpus()
    start = time.perf_counter()
    codes = Codes.update(folder / "cache", vectors)
    assert codes is not None
    seconds = time.perf_counter() - start
    contest: Contest = {
        "floor: bytes read": read_floor(vectors, threads),
        "exact, float16": lambda n: search_exact(vectors, queries[n : n + 1], K),
        "int8 codes, re-scored": lambda n: search_exact(
            vectors, queries[n : n + 1], K, codes=codes
        ),
    }
    if libraries:
        contest |= library_scans(vectors, queries, threads)
    times = measured(contest, rounds)
    print("One query:")
    show(times, times["floor: bytes read"])
    ours = [times[name] for name in ("int8 codes, re-scored", "exact, float16")]
    ratio = np.median(ours[0]) / np.median(ours[1])
    many = search_exact(vectors, queries, K)
    by_codes = search_exact(vectors, queries, K, codes=codes)
    checked = range(0, len(queries), max(1, len(queries) // 16))
    best = np.stack([oracle(vectors, queries[at]) for at in checked])
    reached = recall(by_codes.indexes, many.indexes)
    print(f"  int8 / float16: {ratio:.2f}; recall of int8 {reached:.4f}")
    print(
        f"  float16 equals float64, ranks included: {np.array_equal(many.indexes[checked], best)}"
    )
    print(f"  codes made in {seconds:.1f} s")
    batch = {
        f"{len(queries)} queries, float16": lambda _n: search_exact(vectors, queries, K),
        f"{len(queries)} queries, int8": lambda _n: search_exact(vectors, queries, K, codes=codes),
    }
    print("Many queries at once, per query:")
    for name, value in medians(batch, 1).items():
        print(f"  {name:<34}{value / len(queries):>9.2f} ms")


def filters(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {f"{share:.2%}": rng.random(rows) < share for share in (0.5, 0.1, 0.01, 0.0001)}


def measure_filters(vectors: np.ndarray, queries: np.ndarray, cache: Path, rounds: int) -> None:
    print("Filters, one query: exact; with the index, and its recall:")
    for name, allowed in filters(len(vectors)).items():
        contest: Contest = {
            "exact": lambda n: search_exact(vectors, queries[n : n + 1], K, allowed=allowed),  # noqa: B023
            "index": lambda n: search_vectors(
                vectors,
                queries[n : n + 1],
                K,
                allowed=allowed,  # noqa: B023
                cache=cache,
            ),
        }
        times = medians(contest, rounds)
        exactly = search_exact(vectors, queries, K, allowed=allowed)
        best = np.stack([oracle(vectors, query, allowed) for query in queries[:4]])
        found = search_vectors(vectors, queries, K, allowed=allowed, cache=cache)
        same = np.array_equal(exactly.indexes[:4], best)
        print(
            f"  {name:>7} allowed: {times['exact']:7.2f} ms, equals float64: {same}; "
            f"{times['index']:7.2f} ms, recall {recall(found.indexes, exactly.indexes):.4f}",
            flush=True,
        )


def measure_far_filters(vectors: np.ndarray, queries: np.ndarray, index: AnnIndex) -> None:
    """Print the recall of the index if only the rows farthest from each query are allowed."""
    for share in (0.5, 0.2, 0.06):
        reached, times = [], []
        for query in queries:
            scores = np.concatenate(
                [
                    vectors[at : at + (1 << 14)].astype(np.float32) @ query
                    for at in range(0, len(vectors), 1 << 14)
                ]
            )
            allowed = scores < np.quantile(scores, share)
            start = time.perf_counter()
            found = index.search(query[None], K, allowed=allowed).indexes
            times.append(1000 * (time.perf_counter() - start))
            best = search_exact(vectors, query[None], K, allowed=allowed).indexes
            reached.append(recall(found, best))
        print(
            f"  {share:>7.2%} allowed, the farthest: index {statistics.median(times):.2f} ms, "
            f"recall {statistics.mean(reached):.4f}",
            flush=True,
        )


COLD = """
import sys, time, os
import numpy as np
rows, dim = int(sys.argv[3]), int(sys.argv[4])
for path in sys.argv[1], sys.argv[2] + "/ann.faiss":
    handle = os.open(path, os.O_RDONLY); os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED); os.close(handle)
query = np.load(sys.argv[5])
from pathlib import Path
from cn_clip.search.vectors import search_vectors
vectors = np.memmap(sys.argv[1], np.float16, "r", shape=(rows, dim))
for number in range(20):
    start = time.perf_counter()
    search_vectors(vectors, query[number : number + 1], 10, cache=Path(sys.argv[2]))
    print(1000 * (time.perf_counter() - start))
for line in open("/proc/self/status"):
    if line.startswith("RssAnon"): print(int(line.split()[1]) / 1024)
"""


def measure_cold(vectors: np.ndarray, queries: np.ndarray, cache: Path, file: Path) -> None:
    """Print the time of queries in a new process, without any page of the files in memory."""
    np.save(cache / "queries.npy", queries)
    words = [file, cache, *vectors.shape, cache / "queries.npy"]
    command = [sys.executable, "-c", COLD, *map(str, words)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    *times, resident = (float(line) for line in output.split())
    print(
        f"  cold (new process, files not in memory): first query {times[0]:.0f} ms with opening, "
        f"then {statistics.median(times[1:]):.1f} ms; {resident:.0f} MiB beside the mapped files"
    )


def measure_index(
    vectors: np.ndarray, folder: Path, rounds: int, libraries: bool, file: Path
) -> None:
    generator = Generator(dim=vectors.shape[1])
    sample, queries = generator.queries(SAMPLE, seed=1), generator.queries(1000, seed=2)
    cache = folder / "cache"
    start = time.perf_counter()
    index = AnnIndex.build(vectors, cache, sample)
    seconds = time.perf_counter() - start
    exactly = search_exact(vectors, queries, K)
    found = index.search(queries, K)
    print(
        f"Index: {index.lists:,} cells, {index.probes} scanned for recall 0.98 on "
        f"{SAMPLE} queries; built in {seconds:.0f} s, {len(vectors) / seconds:,.0f} rows/s; "
        f"{(cache / FILE).stat().st_size / 1e6:,.0f} MB"
    )
    contest: Contest = {
        "float16, exact": lambda n: search_exact(vectors, queries[n : n + 1], K),
        "index": lambda n: index.search(queries[n : n + 1], K),
        "search_vectors": lambda n: search_vectors(vectors, queries[n : n + 1], K, cache=cache),
    }
    print(
        f"  recall of {len(queries):,} other queries: {recall(found.indexes, exactly.indexes):.4f}"
    )
    for name, value in medians(contest, 10 * rounds).items():
        print(f"  {name:<34}{value:>9.2f} ms")
    measure_cold(vectors, queries, cache, file)
    if libraries:
        measure_graph(vectors, queries, exactly.indexes, index, rounds)
    measure_filters(vectors, queries[:64], cache, rounds)
    measure_far_filters(vectors, queries[:16], index)


def measure_graph(
    vectors: np.ndarray, queries: np.ndarray, best: np.ndarray, ours: AnnIndex, rounds: int
) -> None:
    """Print the times of faiss's graph (HNSW) of int8 codes, re-scored exactly as ours."""
    import faiss

    faiss.omp_set_num_threads(usable_cpus())
    graph = faiss.index_factory(vectors.shape[1], "HNSW32,SQ8", faiss.METRIC_INNER_PRODUCT)
    start = time.perf_counter()
    sample = np.random.default_rng(0).permutation(len(vectors))[:100_000]
    graph.train(vectors[np.sort(sample)].astype(np.float32))
    for at in range(0, len(vectors), 1 << 16):
        graph.add(vectors[at : at + (1 << 16)].astype(np.float32))
    seconds = time.perf_counter() - start
    faiss.omp_set_num_threads(1)  # as ours for one query
    aim = recall(ours.search(queries, K).indexes, best)

    def search(some: np.ndarray) -> np.ndarray:
        rows = graph.search(some, 100)[1]
        return exact.best_of(vectors, some, [row[row >= 0] for row in rows], K)[0].indexes

    reached = 0.0
    for width in (round(2 ** (power / 2)) for power in range(8, 24)):
        graph.hnsw.efSearch = width
        reached = recall(search(queries), best)
        if reached >= aim:
            break
    contest: Contest = {
        "faiss HNSW, int8, re-scored": lambda n: search(queries[n : n + 1]),
        "index": lambda n: ours.search(queries[n : n + 1], K),
    }
    print(
        f"  faiss HNSW32,SQ8: built in {seconds:.0f} s, {len(vectors) / seconds:,.0f} rows/s; "
        f"efSearch {graph.hnsw.efSearch} for recall {reached:.4f}"
    )
    for name, value in medians(contest, 10 * rounds).items():
        print(f"  {name:<34}{value:>9.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--libraries", action="store_true", help="measure faiss and simsimd too")
    parser.add_argument("--only", choices=["exact", "index"])
    parser.add_argument("--folder", type=Path, help="keep the vectors here; default: temporary")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        vectors = draw(options.folder or Path(scratch), options.rows, options.dim)
        queries = Generator(dim=options.dim).queries(128, seed=3)
        print(f"{options.rows:,} x {options.dim}; {processor_name()}, {usable_cpus()} CPUs")
        read_floor(vectors, 1)(0)
        if options.only != "index":
            measure_exact(vectors, queries, Path(scratch), options.rounds, options.libraries)
        if options.only != "exact":
            file = Path(str(vectors.filename))
            measure_index(vectors, Path(scratch), options.rounds, options.libraries, file)


if __name__ == "__main__":
    main()

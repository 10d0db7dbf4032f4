"""Top 10 of 30,000 vectors for 30,000 queries, compared with the official prediction script.

    python benchmarks/topk.py --official PATH/TO/cn_clip/eval/make_topk_predictions.py

The official script reads feature files, multiplies one query at a time with the gallery, and sorts
tuples in Python. Its ``.cuda()`` call is replaced by the identity; nothing else is changed. It is
run on few and on more queries: the difference excludes the start-up and the reading of the gallery,
and is extrapolated to all queries. Ours is run on all queries, each round in a new process; the
lowest time and the highest peak memory are reported. The first predictions of both are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

FEW, MORE = 20, 220  # queries of the official script

SHIM = """
import runpy, sys, torch
torch.Tensor.cuda = lambda self, *_, **__: self
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def embeddings(count: int, dim: int, seed: int) -> np.ndarray:
    """Return random unit vectors, float32 (count, dim)."""
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def measure_ours(count: int, dim: int) -> dict[str, object]:
    from cn_clip.topk import top_k

    queries, gallery = embeddings(count, dim, 0), embeddings(count, dim, 1)
    start, busy = time.perf_counter(), time.process_time()
    top = top_k(queries, gallery, 10)
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - busy,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "first": top.indexes[:FEW].tolist(),
    }


def write_features(path: Path, key: str, rows: np.ndarray) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for number, row in enumerate(rows):
            stream.write(json.dumps({key: number, "feature": row.tolist()}) + "\n")


def run_official(script: Path, folder: Path, queries: int) -> tuple[float, float]:
    """Return the wall time and the CPU time in seconds."""
    lines = (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "some.jsonl").write_text("".join(lines[:queries]), encoding="utf-8")
    words = [sys.executable, "-c", SHIM, script, "--image-feats", folder / "images.jsonl"]
    words += ["--text-feats", folder / "some.jsonl", "--output", folder / f"{queries}.jsonl"]
    start, busy = time.perf_counter(), os.times()
    subprocess.run(words, check=True, capture_output=True)
    after = os.times()
    cpu = after.children_user + after.children_system - busy.children_user - busy.children_system
    return time.perf_counter() - start, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=30_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--official", type=Path, help="make_topk_predictions.py of cn_clip 1.6.0")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    count, dim = options.count, options.dim
    if options.child:
        print(json.dumps(measure_ours(count, dim)))
        return
    command = [sys.executable, __file__, "--child", "--count", str(count), "--dim", str(dim)]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(options.rounds)
    ]
    figures: dict[str, float] = {
        "seconds": min(run["seconds"] for run in runs),
        "cpu": min(run["cpu"] for run in runs),
        "peak": max(run["peak"] for run in runs),
    }
    print(f"{count:,} x {count:,} x {dim}, top 10; {platform.machine()}, {os.cpu_count()} CPUs")
    print(
        f"ours: {figures['seconds']:.1f} s, {figures['cpu']:.1f} s of CPU, "
        f"{figures['peak'] / 1e9:.2f} GB peak memory (target: 1.5 GB)"
    )
    if options.official:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_features(folder / "images.jsonl", "image_id", embeddings(count, dim, 1))
            write_features(folder / "texts.jsonl", "text_id", embeddings(count, dim, 0)[:MORE])
            few, more = (run_official(options.official, folder, n) for n in (FEW, MORE))
            lines = (folder / f"{FEW}.jsonl").read_text(encoding="utf-8").splitlines()
        theirs = [json.loads(line)["image_ids"] for line in lines]
        same = sum(a == b for a, b in zip(theirs, runs[0]["first"], strict=True))
        for name, at in (("seconds", 0), ("cpu", 1)):
            figures[f"official {name}"] = (more[at] - few[at]) / (MORE - FEW) * count
        print(
            f"official: {figures['official seconds']:.0f} s, {figures['official cpu']:.0f} s of "
            f"CPU, extrapolated from {MORE - FEW} queries; {same} of the first {FEW} predictions "
            "are equal"
        )
        print(
            f"ratio: {figures['official seconds'] / figures['seconds']:.0f} x, of CPU "
            f"{figures['official cpu'] / figures['cpu']:.0f} x (target: 30 x)"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

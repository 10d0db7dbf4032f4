"""``convert`` compared with a copy of the file: seconds, and peak memory over ``import torch``.

    python benchmarks/convert.py CHECKPOINT.pt [--rounds 3]

In turns, each conversion in a process of its own; both write to the same disk, and both are
flushed to it. The time of ``convert`` is that of the function, without Python's start.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import json, resource, sys, time
import torch, numpy
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter()
from cn_clip.convert import convert
done = convert(*sys.argv[1:4])
seconds = time.perf_counter() - begin
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "difference": done.largest_difference}))
"""


def copy(source: Path, target: Path) -> float:
    begin = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("r+b") as stream:
        os.fsync(stream.fileno())
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    size = options.checkpoint.stat().st_size
    copies: list[float] = []
    results: dict[str, list[dict[str, float]]] = {"safetensors": [], "hf": [], "official": []}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as work:
        for _ in range(options.rounds):
            target = Path(work) / "copy.pt"
            copies.append(copy(options.checkpoint, target))
            target.unlink()
            for to, runs in results.items():
                out = Path(work) / ("out.pt" if to == "official" else to)
                run = [sys.executable, "-c", CHILD, str(options.checkpoint), str(out), to]
                done = subprocess.run(run, capture_output=True, text=True, check=True)
                runs.append(json.loads(done.stdout))
                shutil.rmtree(out) if out.is_dir() else out.unlink()
    print(f"copy: {min(copies):.2f} s (all: {', '.join(f'{s:.2f}' for s in copies)})")
    for to, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        peak = max(run["peak"] for run in runs)
        bar = 2 * min(copies) + 1
        print(
            f"convert --to {to}: {min(seconds):.2f} s (all: "
            f"{', '.join(f'{s:.2f}' for s in seconds)}; bar {bar:.2f}), "
            f"peak {peak / size:.2f} x the weights"
        )


if __name__ == "__main__":
    sys.exit(main())

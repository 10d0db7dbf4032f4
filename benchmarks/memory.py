"""Memory of a backend over calls of mixed shapes, and time and memory of the first query.

    python benchmarks/memory.py [--export FOLDER] [--calls 5000]

Each backend runs in a process of its own: `mini`'s text tower on batches of 1 to 70 texts of 1 to
50 characters, and every tenth call its image tower on 1 to 9 images. The last thousand of 5,000
calls should add at most 5 MiB. The first query counts from `import cn_clip` to its embedding.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

FIRST = """
import time; start = time.perf_counter()
import cn_clip
cn_clip.load({folder!r}, backend={backend!r}).embed_texts("一只猫")
import sys
print(time.perf_counter() - start, "torch" in sys.modules)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"): print(int(line.split()[1]) / 1024)
"""


def resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def measure(folder: str, backend: str, calls: int) -> None:
    import cn_clip

    embedder = cn_clip.load(folder, backend=backend)
    rng = np.random.default_rng(0)
    size = embedder.config.vision.resolution
    pixels = rng.integers(0, 256, (9, 3, size, size), dtype=np.uint8)
    marks, start = [resident_mb()], time.perf_counter()
    for call in range(1, calls + 1):
        texts = ["猫" * int(rng.integers(1, 51)) for _ in range(int(rng.integers(1, 71)))]
        embedder.embed_texts(texts)
        if call % 10 == 0:
            embedder.backend.run_images(pixels[: int(rng.integers(1, 10))])
        if call % (calls // 5) == 0:
            marks.append(resident_mb())
    growth = " ".join(f"{mark:,.0f}" for mark in marks)
    print(
        f"{backend}: MiB at the start and after each fifth of {calls:,} calls: {growth}; last "
        f"fifth {marks[-1] - marks[-2]:+.1f}; {time.perf_counter() - start:.0f} s"
    )


def first_query(folder: str, backend: str) -> None:
    code = FIRST.format(folder=folder, backend=backend)
    results = []
    for _ in range(6):  # the first one runs the self-test, and fills the page cache
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        seconds, torch, peak = output.stdout.decode().split()
        results.append((float(seconds), float(peak)))
    seconds, peak = min(results[1:])
    print(f"{backend}: first query {seconds:.2f} s, {peak:,.0f} MiB, torch imported: {torch}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--export", help="of mini; made if not given")
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        measure(options.export, options.here, options.calls)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.export
        if folder is None:
            from cn_clip.export import export

            folder = export("mini", Path(scratch) / "mini").out
        for backend in ("onnx", "openvino"):
            first_query(folder, backend)
            command = [sys.executable, __file__, "--here", backend, "--export", folder]
            subprocess.run([*command, "--calls", str(options.calls)], check=True)


if __name__ == "__main__":
    main()

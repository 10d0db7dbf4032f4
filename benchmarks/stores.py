"""Blocks of an object store by obstore, which cn_clip uses, and by fsspec.

    python benchmarks/stores.py [--latency 0.02]

A server on loopback (tests/data/object_server.py) waits before each answer. Blocks of 4 MB of 20
files are read in 16 threads, by S3 and by HTTP; the best of two rounds counts. This Python needs
obstore, s3fs and aiohttp.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK, FILES, SIZE, THREADS = 4 << 20, 20, 20 << 20, 16
JOBS = [(f"{file:05}.tar", at) for at in range(0, SIZE, BLOCK) for file in range(FILES)]


def readers(url: str) -> dict[str, Callable[[str, int], bytes]]:
    """Return a function for each library and protocol that reads the block at an offset."""
    import fsspec
    import obstore
    from obstore.store import from_url

    plain = {"allow_http": True}
    s3, web = from_url("s3://bucket", client_options=plain), from_url(url, client_options=plain)
    s3fs = fsspec.filesystem("s3", endpoint_url=url, key="x", secret="x")
    http = fsspec.filesystem("http")

    def by_obstore(store: object, path: str, at: int) -> bytes:
        return bytes(obstore.get(store, path, options={"range": (at, at + BLOCK)}).bytes())

    return {
        "obstore, S3": lambda name, at: by_obstore(s3, name, at),
        "fsspec, S3": lambda name, at: s3fs.cat_file(f"bucket/{name}", start=at, end=at + BLOCK),
        "obstore, HTTP": lambda name, at: by_obstore(web, f"bucket/{name}", at),
        "fsspec, HTTP": lambda name, at: http.cat_file(
            f"{url}/bucket/{name}", start=at, end=at + BLOCK
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before each answer")
    options = parser.parse_args()
    server = Path(__file__).parent.parent / "tests" / "data" / "object_server.py"
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(FILES):
            Path(folder, f"{number:05}.tar").write_bytes(os.urandom(SIZE))
        command = [sys.executable, str(server), folder, str(options.latency)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
            os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_REGION": "x"}
            os.environ["AWS_SECRET_ACCESS_KEY"] = "x"
            reads = readers(url)
            for _round in range(2):
                for name, read in reads.items():
                    start, cpu = time.perf_counter(), time.process_time()
                    with ThreadPoolExecutor(THREADS) as pool:
                        total = sum(pool.map(lambda job, read=read: len(read(*job)), JOBS))
                    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
                    best[name] = max(best.get(name, (0.0, 0.0)), (total / seconds / 1e6, cpu))
        finally:
            process.kill()
    print(f"{'':<16} {'MB/s':>6} {'CPU s':>6}")
    for name, (speed, cpu) in best.items():
        print(f"{name:<16} {speed:6,.0f} {cpu:6.2f}")


if __name__ == "__main__":
    main()

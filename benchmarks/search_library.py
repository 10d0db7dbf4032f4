"""The library of ``cn-clip index``: rate, an unchanged tree, and a million images.

    python benchmarks/search_library.py [rate | unchanged | first | million | page ...]

- rate: images per second of ``index`` and of ``embed`` on the same photos, alternately, with
  thumbnails off and on; the ratios are those of the best rounds, of time and of CPU time.
- unchanged: ``index`` of a tree of 100,000 files in which nothing has changed, as a command.
- first: seconds from pressing Enter on ``cn-clip search`` to the result, with ``mini`` and 100,000
  images; by ONNX Runtime if ``cn-clip export --model mini --to onnx`` was run, else by torch.
- page: seconds from the last key of a query on the page of `cn-clip serve` to its first results, in
  Chromium, with 100,000 images drawn by `embedding_generator.py`. Every query is another one. It
  needs `pip install playwright` and `--chromium FILE`, and runs only if it is named.
- million: a library of 1,000,000 images, filled by SQL; time to open it, and resident memory
  beside the mapped vectors.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from embed import make_photos
from embedding_generator import Generator
from PIL import Image

from cn_clip import load
from cn_clip.embedder import Embedder, exported_model
from cn_clip.embeddings.extract import extract
from cn_clip.embeddings.inputs import read_images
from cn_clip.search.background import prepare_search
from cn_clip.search.folder import LibraryFolder, add_model, create
from cn_clip.search.indexing import index
from cn_clip.search.reading import make_thumbnail
from cn_clip.search.roots import parse_root
from cn_clip.search.thumbnails import thumbnail_path

FILES_PER_FOLDER = 1000
_THINGS = ["海边的日落", "雪山下的木屋", "窗台上的猫", "红色的汽车", "夜晚的城市", "餐桌上的水果"]
_STYLES = ["远处", "近景", "俯拍", "雨天", "清晨"]
# The first row of results is there: all of its images are decoded.
_SHOWN = """() => {
  const images = [...document.querySelectorAll("#grid .tile img")].slice(0, 8);
  return images.length === 8 && images.every((image) => image.complete && image.naturalWidth);
}"""


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def rate(work: Path, options: argparse.Namespace) -> None:
    embedder = load(options.model)
    photos = work / "photos"
    photos.mkdir()
    make_photos(photos, options.photos)
    embedder.embed_images([*photos.iterdir()][:64])
    names = ("embed", "index, no thumbnails", "index, thumbnails")
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names[number % 3 :] + names[: number % 3]:
            out = work / f"{number}-{name.replace(', ', '-')}"
            rounds[name].append(timed(name, embedder, photos, out))
    best = {name: [min(values) for values in zip(*rounds[name], strict=True)] for name in names}
    for name, (seconds, cpu) in best.items():
        print(
            f"{name}: {options.photos / seconds:.0f} images per second, "
            f"{best['embed'][0] / seconds:.1%} of embed; CPU {1000 * cpu / options.photos:.1f} ms "
            f"an image, {best['embed'][1] / cpu:.1%} of embed"
        )


def timed(name: str, embedder: Embedder, photos: Path, out: Path) -> tuple[float, float]:
    """Return seconds and seconds of CPU time."""
    start, cpu = time.perf_counter(), time.process_time()
    if name == "embed":
        extract(embedder, "images", read_images([str(photos)]), out.with_suffix(".npz"))
    else:
        create(out)
        with LibraryFolder(out, writable=True) as library, library.writing("index"):
            index(
                library,
                [parse_root(str(photos))],
                lambda: embedder,
                "mini",
                thumbnails=name.endswith(", thumbnails"),
            )
    return time.perf_counter() - start, time.process_time() - cpu


def unchanged(work: Path, options: argparse.Namespace) -> None:
    """The tree is of small files, and the library is filled by SQL: nothing reads either."""
    tree, path = work / "tree", work / "library"
    create(path)
    embedder, facts = load(options.model), []
    for number in range(options.files):
        folder = tree / f"{number // FILES_PER_FOLDER:03}"
        if not number % FILES_PER_FOLDER:
            folder.mkdir(parents=True)
        file = folder / f"{number}.jpg"
        file.write_bytes(b"%d" % number)
        status = file.stat()
        name = os.fsencode(file.relative_to(tree))
        facts.append((number + 1, name, status.st_size, status.st_mtime_ns))
    with LibraryFolder(path, writable=True) as library:
        with library.database.transaction() as connection:
            add_model(connection, options.model, embedder, "active")
            connection.execute("UPDATE models SET rows = ?", (options.files,))
            connection.execute(
                "INSERT INTO roots (id, kind, location, include, exclude, hidden) "
                "VALUES (1, 'folder', ?, '[]', '[]', 0)",
                (os.fsencode(os.path.realpath(tree)),),
            )
            connection.executemany(
                "INSERT INTO images (id, digest, bytes, width, height) VALUES (?, ?, 9, 9, 9)",
                ((image, hashlib.blake2b(name, digest_size=16).digest())
                 for image, name, *_ in facts),
            )  # fmt: skip
            connection.executemany(
                "INSERT INTO files (image, root, name, size, mtime) VALUES (?, 1, ?, ?, ?)", facts
            )
        vectors = np.random.default_rng(0).normal(size=(options.files, embedder.dim))
        library.vector_file(library.models()[0]).write(0, vectors)
    words = ["index", str(tree), "--library", str(path), "--json"]
    before = os.times().children_user + os.times().children_system
    times = [command(words) for _ in range(3)]
    cpu = (os.times().children_user + os.times().children_system - before) / 3
    print(
        f"index of {options.files:,} unchanged files, start of the command included: "
        f"{min(times):.1f} s, the slowest of three {max(times):.1f} s, "
        f"CPU {cpu:.1f} s"
    )


def command(words: list[str]) -> float:
    start = time.perf_counter()
    words = [sys.executable, "-m", "cn_clip", *words]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE)
    assert json.loads(done.stdout)["embedded"] == 0
    return time.perf_counter() - start


def million(work: Path, options: argparse.Namespace) -> None:
    path, count, dim = work / "million", options.images, options.dim
    fill(path, count, dim)
    size = sum(file.stat().st_size for file in path.glob("library.db*"))
    print(f"{count:,} images of width {dim}: database {size / 1e6:.0f} MB")
    code = f"""
import time, resource
import numpy
from cn_clip.search.library import Library
from cn_clip.search.vectors import search_vectors
def memory():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1e3
before = memory()
start = time.perf_counter()
library = Library({str(path)!r})
snapshot = library.folder.snapshot()
opened = time.perf_counter() - start
allowed = library._allowed(snapshot, None)
print(f"opened in {{opened:.3f}} s; {{snapshot.count:,}} searchable; memory of the process beside "
      f"mapped files {{memory():.0f}} MB, {{memory() - before:.0f}} MB of it for the library")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def first(work: Path, options: argparse.Namespace) -> None:
    embedder = load("mini")
    path = work / "first"
    fill(path, options.files, embedder.dim, embedder.fingerprint)
    with LibraryFolder(path, writable=True) as library:
        prepare_search(library, embedder)
    words = ["search", "一只猫", "--library", str(path), "--json"]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "cn_clip", *words], check=True, stdout=subprocess.PIPE
        )
        times.append(time.perf_counter() - start)
        assert len(json.loads(done.stdout)["hits"]) == 10
    runtime = "torch" if exported_model("mini") is None else "ONNX Runtime"
    print(
        f"search of {options.files:,} images by {runtime}: {statistics.median(times):.2f} s from "
        f"the start of the command, {min(times):.2f} to {max(times):.2f}"
    )


def page(work: Path, options: argparse.Namespace) -> None:
    from playwright.sync_api import sync_playwright

    embedder, path = load("mini"), work / "page"
    fill(path, options.files, embedder.dim, embedder.fingerprint)
    with LibraryFolder(path, writable=True) as library:
        vectors = Generator().images(options.files)
        library.vector_file(library.models()[0]).write(0, vectors)
        write_thumbnails(path, [digest for (digest,) in library.query("SELECT digest FROM images")])
        prepare_search(library, embedder)
    words = ["serve", "--library", str(path), "--port", "0"]
    with (
        subprocess.Popen(
            [sys.executable, "-m", "cn_clip", *words], stderr=subprocess.PIPE, text=True
        ) as server,
        sync_playwright() as playwright,
    ):
        try:
            assert server.stderr is not None
            address = re.search(r"http://\S+", server.stderr.readline())
            assert address, "the server did not start"
            threading.Thread(target=lambda: [*(server.stderr or ())], daemon=True).start()
            browser = playwright.chromium.launch(
                executable_path=options.chromium, args=["--no-sandbox", "--disable-gpu"]
            )
            # Playwright evaluates strings to wait, which the policy of the page forbids.
            shown = browser.new_page(viewport={"width": 1280, "height": 800}, bypass_csp=True)
            shown.goto(address[0], timeout=120_000)
            times = [timed_query(shown, f"{a}，{b}") for a in _STYLES for b in _THINGS]
            browser.close()
        finally:
            server.terminate()
    print(
        f"page over {options.files:,} images: first results {statistics.median(times):.2f} s after "
        f"the last key, median of {len(times)} queries; the first query {times[0]:.2f} s, the "
        f"slowest other {max(times[1:]):.2f} s"
    )


def timed_query(shown: Any, query: str) -> float:
    """Type a query into an empty field; return the seconds from its last key to its results."""
    shown.fill("#query", "")
    shown.wait_for_function("!document.querySelector('#grid').children.length")
    shown.locator("#query").press_sequentially(query, delay=60)
    start = time.perf_counter()
    shown.wait_for_function(_SHOWN)
    return time.perf_counter() - start


def write_thumbnails(path: Path, digests: list[bytes]) -> None:
    """Write a thumbnail for each image: links to 16 small files, as 100,000 take minutes."""
    contents = []
    for seed in range(16):
        noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noise).resize((256, 192)).save(stream, "PNG")
        contents.append(make_thumbnail(stream.getvalue()))
    for number, digest in enumerate(digests):
        file = thumbnail_path(path, digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        if number < len(contents):
            file.write_bytes(contents[number])
        else:
            os.link(thumbnail_path(path, digests[number % len(contents)]), file)


def fill(path: Path, count: int, dim: int, fingerprint: str = "f") -> None:
    """Make a library of random vectors; one image in a hundred has lost its file."""
    create(path)
    rng = np.random.default_rng(0)
    with LibraryFolder(path, writable=True) as library:
        with library.database.transaction() as connection:
            connection.execute(
                "INSERT INTO models (name, fingerprint, precision, fast_decode, dim, logit_scale, "
                "state, created) VALUES ('mini', ?, 'float32', 0, ?, 20, 'active', '')",
                (fingerprint, dim),
            )
            connection.execute(
                "INSERT INTO roots (id, kind, location, include, exclude, hidden) "
                "VALUES (1, 'folder', ?, '[]', '[]', 0)",
                (b"/photos",),
            )
            insert(connection, count)
            connection.execute("UPDATE models SET rows = ?", (count,))
        model = library.models()[0]
        for start in range(0, count, 50_000):
            rows = rng.standard_normal((min(50_000, count - start), dim), np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            library.vector_file(model).write(start, rows)


def insert(connection: sqlite3.Connection, count: int) -> None:
    connection.executemany(
        "INSERT INTO images (id, digest, bytes, width, height, taken, look) "
        "VALUES (?, ?, 1000000, 4000, 3000, '2024-05-01T12:00:00', ?)",
        ((n, hashlib.blake2b(b"%d" % n, digest_size=16).digest(), bytes(32))
         for n in range(1, count + 1)),
    )  # fmt: skip
    connection.executemany(
        "INSERT INTO files (root, name, size, mtime, image, present) "
        "VALUES (1, ?, 1000000, 1700000000000000000, ?, ?)",
        ((f"{n // 1000:04}/IMG_{n:07}.jpg".encode(), n, n % 100 != 0)
         for n in range(1, count + 1)),
    )  # fmt: skip


PARTS = {"rate": rate, "unchanged": unchanged, "first": first, "million": million, "page": page}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=[name for name in PARTS if name != "page"])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--chromium", help="the browser for `page`")
    parser.add_argument("--work", help="folder for temporary files")
    options = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f}")
    for part in options.parts:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            PARTS[part](Path(work), options)


if __name__ == "__main__":
    main()

"""The core compared with the official package: import, load, tokenize, preprocess, embed.

    python benchmarks/core.py --peer OTHER/bin/python --weights FOLDER

The peer is a Python with the official `cn-clip`; without it, only our package is measured. FOLDER
has `clip_cn_vit-b-16.pt`; without it, a file of the same shapes is generated from the deterministic
weights of the tests. Both packages run the same calls, alternately in separate processes; the best
of all rounds counts. Ratios above 1 are in our favour.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEGABYTE = 2**20

# name -> (unit, whether more is better)
ROWS = {
    "import cn_clip.clip, after torch": ("s", False),
    "load ViT-B/16": ("s", False),
    "load, peak memory over torch": ("MB", False),
    "tokenize": ("texts/s", True),
    "preprocess, photos": ("images/s", True),
    "preprocess, 12 megapixels": ("images/s", True),
    "preprocess, 12 megapixels, fast_decode": ("images/s", True),
    "image embedding, batch 1": ("images/s", True),
    "image embedding, batch 16": ("images/s", True),
    "text embedding, batch 1": ("texts/s", True),
    "text embedding, batch 64": ("texts/s", True),
    "text embedding, all captions": ("texts/s", True),
    "peak memory of all of it": ("MB", False),
}


def measure_import() -> dict[str, float]:
    import torch  # noqa: F401

    start = time.perf_counter()
    import cn_clip.clip  # noqa: F401

    return {"import cn_clip.clip, after torch": time.perf_counter() - start}


def measure_load(weights: str) -> dict[str, float]:
    import torch  # noqa: F401

    before = _peak_memory()
    from cn_clip.clip import load_from_name

    start = time.perf_counter()
    load_from_name("ViT-B-16", device="cpu", download_root=weights)
    seconds = time.perf_counter() - start
    return {"load ViT-B/16": seconds, "load, peak memory over torch": _peak_memory() - before}


def measure_work(weights: str, captions: list[str]) -> dict[str, float]:
    import torch
    from PIL import Image

    import cn_clip.clip as clip

    model, preprocess = clip.load_from_name("ViT-B-16", device="cpu", download_root=weights)
    model.eval()  # the official loader leaves it in training mode
    photos = sorted((ROOT / "examples").glob("*.jpg"))

    def prepare(path: Path) -> None:
        preprocess(Image.open(path))

    ids = [clip.tokenize(captions[start : start + 64]) for start in range(0, len(captions), 64)]
    images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    results = {"tokenize": _items_per_second(lambda: clip.tokenize(captions), len(captions))}
    results["preprocess, photos"] = _items_per_second(
        lambda: [prepare(p) for p in photos], len(photos)
    )
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large.jpg"
        Image.open(photos[0]).resize((4000, 3000)).save(large, quality=92)
        results["preprocess, 12 megapixels"] = _items_per_second(lambda: prepare(large), 1)
        if _is_ours():
            results["preprocess, 12 megapixels, fast_decode"] = _items_per_second(
                lambda: _fast(large), 1
            )
        else:  # the official package has no such option
            results["preprocess, 12 megapixels, fast_decode"] = results["preprocess, 12 megapixels"]
    with torch.inference_mode():
        for batch in (1, 16):
            results[f"image embedding, batch {batch}"] = _items_per_second(
                lambda batch=batch: model.encode_image(images[:batch]), batch
            )
        results["text embedding, batch 1"] = _items_per_second(
            lambda: model.encode_text(ids[0][:1]), 1
        )
        results["text embedding, batch 64"] = _items_per_second(
            lambda: model.encode_text(ids[0]), 64
        )
    results["text embedding, all captions"] = _items_per_second(
        _embed_all(model, clip, captions), len(captions), min_calls=1
    )
    return results | {"peak memory of all of it": _peak_memory()}


def _embed_all(model: Any, clip: Any, captions: list[str]) -> Callable[[], object]:
    """Return a function from strings to embeddings, in each package's fastest way."""
    import torch

    if _is_ours():
        from cn_clip.embedder import Embedder

        embedder = Embedder.from_model(model)
        return lambda: embedder.embed_texts(captions)

    @torch.inference_mode()
    def embed() -> None:
        for start in range(0, len(captions), 64):
            features = model.encode_text(clip.tokenize(captions[start : start + 64]))
            features /= features.norm(dim=-1, keepdim=True)

    return embed


def _fast(path: Path) -> None:
    from cn_clip.image.decode import normalize, read_image, to_pixels

    normalize(to_pixels(read_image(path, fast_decode=224), 224))


def _is_ours() -> bool:
    import cn_clip

    return hasattr(cn_clip, "load")


def _items_per_second(
    call: Callable[[], object], items: int, *, min_calls: int = 3, seconds: float = 1.0
) -> float:
    """Return the items per second of the fastest of several calls, after one to warm up."""
    call()
    best, total, calls = float("inf"), 0.0, 0
    while calls < min_calls or total < seconds:
        start = time.perf_counter()
        call()
        elapsed = time.perf_counter() - start
        best, total, calls = min(best, elapsed), total + elapsed, calls + 1
    return items / best


def _peak_memory() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if platform.system() == "Darwin" else 1024) / MEGABYTE


def make_weights(folder: Path) -> Path:
    """Write a checkpoint with official names and shapes, and the weights of the golden tests."""
    import numpy as np
    import torch

    sys.path.insert(0, str(ROOT / "tests" / "golden"))
    from fill import fill

    shapes = json.loads((ROOT / "tests/golden/state_dict_ViT-B-16.json").read_text())
    state = {
        f"module.{name}": torch.from_numpy(np.asarray(fill(name, tuple(shape))))
        for name, shape in shapes.items()
    }
    torch.save({"epoch": 0, "state_dict": state}, folder / "clip_cn_vit-b-16.pt")
    return folder


def run_measurement(
    python: list[str], name: str, weights: Path, captions: Path
) -> dict[str, float]:
    command = [*python, __file__, "--measure", name]
    command += ["--weights", str(weights), "--captions", str(captions)]
    process = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(process.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure_here(options: argparse.Namespace) -> None:
    """Run one measurement in this process and print it as JSON."""
    if options.measure == "import":
        result = measure_import()
    elif options.measure == "load":
        result = measure_load(str(options.weights))
    else:
        result = measure_work(str(options.weights), options.captions.read_text("utf-8").split("\n"))
    print(json.dumps(result))


def compare_packages(options: argparse.Namespace, scratch: Path) -> None:
    from things468 import fetch, things

    weights = options.weights or make_weights(scratch)
    texts = list(dict.fromkeys(c for _, c in things(options.stamps or fetch(scratch))))
    (scratch / "captions.txt").write_text("\n".join(texts), "utf-8")
    pythons = {"ours": [sys.executable]}
    if options.peer:
        pythons["peer"] = [options.peer, "-E"]  # without a PYTHONPATH, which may have ours
    best: dict[str, dict[str, float]] = {package: {} for package in pythons}
    for _ in range(options.rounds):
        for measurement in ("import", "load", "work"):
            for package, python in pythons.items():
                values = run_measurement(python, measurement, weights, scratch / "captions.txt")
                for name, value in values.items():
                    better = max if ROWS[name][1] else min
                    best[package][name] = better(value, best[package].get(name, value))
    mean = sum(map(len, texts)) / len(texts)
    print(f"ViT-B/16, float32; {len(texts)} captions of {mean:.1f} characters on average; ", end="")
    print(f"best of {options.rounds} rounds; {platform.machine()}, Python {sys.version.split()[0]}")
    print(f"{'':<40} {'peer':>10} {'ours':>10} {'ratio':>7}")
    for name, (unit, more_is_better) in ROWS.items():
        ours, peer = best["ours"][name], best.get("peer", {}).get(name)
        ratio = (ours / peer if more_is_better else peer / ours) if peer else None
        columns = f"{_cell(peer)} {_cell(ours)} " + (f"{ratio:6.1f}x" if ratio else f"{'-':>7}")
        print(f"{name:<40} {columns} {unit}")


def _cell(value: float | None) -> str:
    if value is None:
        return f"{'-':>10}"
    return f"{value:10.2f}" if value < 10 else f"{value:10,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", help="a Python with the official cn-clip")
    parser.add_argument("--weights", type=Path, help="folder with clip_cn_vit-b-16.pt")
    parser.add_argument("--stamps", type=Path, help="Tux Paint's stamps; downloaded by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=("import", "load", "work"), help=argparse.SUPPRESS)
    parser.add_argument("--captions", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure_here(options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare_packages(options, Path(scratch))


if __name__ == "__main__":
    main()

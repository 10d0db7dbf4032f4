"""The core beside the official package: import, load, tokenize, preprocess, embed.

    python benchmarks/core.py --peer OTHER/bin/python --weights FOLDER

The peer is any Python in which the official `cn-clip` is installed; without one, only our side is
measured. FOLDER holds `clip_cn_vit-b-16.pt`; without one, a file of that shape is made from the
deterministic weights of the tests. Both sides run the same calls of the same names, in processes of
their own, in turns; the best of all rounds counts. Ratios above 1 are in our favour.
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
    rates = {"tokenize": _rate(lambda: clip.tokenize(captions), len(captions))}
    rates["preprocess, photos"] = _rate(lambda: [prepare(p) for p in photos], len(photos))
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large.jpg"
        Image.open(photos[0]).resize((4000, 3000)).save(large, quality=92)
        rates["preprocess, 12 megapixels"] = _rate(lambda: prepare(large), 1)
        if _is_ours():
            rates["preprocess, 12 megapixels, fast_decode"] = _rate(lambda: _fast(large), 1)
        else:  # the official package has no such option: its exact pixels are what it can do
            rates["preprocess, 12 megapixels, fast_decode"] = rates["preprocess, 12 megapixels"]
    with torch.inference_mode():
        for batch in (1, 16):
            rates[f"image embedding, batch {batch}"] = _rate(
                lambda batch=batch: model.encode_image(images[:batch]), batch
            )
        rates["text embedding, batch 1"] = _rate(lambda: model.encode_text(ids[0][:1]), 1)
        rates["text embedding, batch 64"] = _rate(lambda: model.encode_text(ids[0]), 64)
    rates["text embedding, all captions"] = _rate(
        _embed_all(model, clip, captions), len(captions), least=1
    )
    return rates | {"peak memory of all of it": _peak_memory()}


def _embed_all(model: Any, clip: Any, captions: list[str]) -> Callable[[], object]:
    """From strings to unit vectors, by each package's own best way."""
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


def _rate(call: Callable[[], object], items: int, *, least: int = 3, seconds: float = 1.0) -> float:
    """Items per second of the fastest of several calls, after one to warm up."""
    call()
    best, spent, calls = float("inf"), 0.0, 0
    while calls < least or spent < seconds:
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        best, spent, calls = min(best, took), spent + took, calls + 1
    return items / best


def _peak_memory() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if platform.system() == "Darwin" else 1024) / MEGABYTE


def make_weights(folder: Path) -> Path:
    """Write a checkpoint of the official names and shapes, with the weights of the golden tests."""
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


def run_side(python: str, what: str, weights: Path, captions: Path) -> dict[str, float]:
    command = [python, __file__, "--measure", what]
    command += ["--weights", str(weights), "--captions", str(captions)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure_here(options: argparse.Namespace) -> None:
    """One measurement in this process, printed as JSON: what the processes of each side run."""
    if options.measure == "import":
        result = measure_import()
    elif options.measure == "load":
        result = measure_load(str(options.weights))
    else:
        result = measure_work(str(options.weights), options.captions.read_text("utf-8").split("\n"))
    print(json.dumps(result))


def compare(options: argparse.Namespace, scratch: Path) -> None:
    from things468 import fetch, things

    weights = options.weights or make_weights(scratch)
    texts = list(dict.fromkeys(c for _, c in things(options.stamps or fetch(scratch))))
    (scratch / "captions.txt").write_text("\n".join(texts), "utf-8")
    sides = {"ours": sys.executable} | ({"peer": options.peer} if options.peer else {})
    best: dict[str, dict[str, float]] = {side: {} for side in sides}
    for _ in range(options.rounds):
        for what in ("import", "load", "work"):
            for side, python in sides.items():
                got = run_side(python, what, weights, scratch / "captions.txt")
                for name, value in got.items():
                    pick = max if ROWS[name][1] else min
                    best[side][name] = pick(value, best[side].get(name, value))
    mean = sum(map(len, texts)) / len(texts)
    print(f"ViT-B/16, float32; {len(texts)} captions of {mean:.1f} characters on average; ", end="")
    print(f"best of {options.rounds} rounds; {platform.machine()}, Python {sys.version.split()[0]}")
    print(f"{'':<40} {'peer':>10} {'ours':>10} {'ratio':>7}")
    for name, (unit, more) in ROWS.items():
        ours, peer = best["ours"][name], best.get("peer", {}).get(name)
        ratio = (ours / peer if more else peer / ours) if peer else None
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
    parser.add_argument("--stamps", type=Path, help="Tux Paint's stamps; fetched if not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=("import", "load", "work"), help=argparse.SUPPRESS)
    parser.add_argument("--captions", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure_here(options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare(options, Path(scratch))


if __name__ == "__main__":
    main()

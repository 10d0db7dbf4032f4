"""Backends compared with the official package and transformers: ViT-B/16 on this CPU.

    python benchmarks/runtimes.py --peer OTHER/bin/python [--weights FOLDER] [--int8]

The peer is a Python with the official `cn-clip` 1.6.0. FOLDER has `clip_cn_vit-b-16.pt`; without
it, random initial weights are used, whose embeddings say nothing about quality. Every contestant
runs in a process of its own, a round each in turn; medians count. One that does not start, or dies,
is reported and dropped. `bare` is the runtime alone on the same graph and the same batch. The floor
is a matrix product of the model's sizes.

"12-megapixel files" are read by ours with `fast_decode`, which decodes JPEG files at reduced size;
in the row "exact", without it. The others have no such option and read them alike in both rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BATCH, TEXTS, PHOTOS = 8, 47, 24
MEDIAN = "红色的毛线帽"  # 6 characters, as the mean of real captions
ROWS = {
    "image batch": "images/s",
    "texts": "texts/s",
    "one text": "ms",
    "12-megapixel files": "images/s",
    "12-megapixel files, exact": "images/s",
}

EXPORTS = [("onnx", "float32"), ("onnx", "int8"), ("openvino", "int8")]

# name -> backend, precision, and the export that it runs
OURS = {
    "torch float32": ("torch", "float32", None),
    "torch bfloat16": ("torch", "bfloat16", None),
    "onnx float32": ("onnx", "auto", "onnx-float32"),
    "openvino float32": ("openvino", "auto", "onnx-float32"),
    "openvino bfloat16": ("openvino", "bfloat16", "onnx-float32"),
}
INT8 = {
    "onnx int8": ("onnx", "auto", "onnx-int8"),
    "openvino int8": ("openvino", "auto", "openvino-int8"),
    "openvino int8+bfloat16": ("openvino", "bfloat16", "openvino-int8"),
}
BARE = {"bare onnx": "onnx float32", "bare openvino": "openvino float32"}

Work = dict[str, Callable[[], object]]


def official(folder: Path, captions: list[str], photos: list[Path]) -> tuple[Work, Any]:
    import torch
    from PIL import Image

    import cn_clip.clip as clip

    model, preprocess = clip.load_from_name("ViT-B-16", device="cpu", download_root=str(folder))
    model.eval()
    pixels = torch.from_numpy(np.load(folder / "pixels.npy"))

    def texts(some: list[str]) -> np.ndarray:
        return unit(model.encode_text(clip.tokenize(some)))

    def files() -> object:
        batch = torch.stack([preprocess(Image.open(path)) for path in photos])
        return unit(model.encode_image(batch))

    return work(torch, lambda: unit(model.encode_image(pixels)), texts, files, captions)


def transformers(folder: Path, captions: list[str], photos: list[Path]) -> tuple[Work, Any]:
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, ChineseCLIPImageProcessor, ChineseCLIPModel

    model = ChineseCLIPModel.from_pretrained(folder / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "onnx-float32")
    processor = ChineseCLIPImageProcessor.from_pretrained(folder / "hf")
    pixels = torch.from_numpy(np.load(folder / "pixels.npy"))

    def images(batch: Any) -> np.ndarray:
        return unit(model.get_image_features(pixel_values=batch).pooler_output)

    def texts(some: list[str]) -> np.ndarray:
        inputs = tokenizer(some, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        return unit(model.get_text_features(**inputs).pooler_output)

    def files() -> object:
        loaded = [Image.open(path) for path in photos]
        return images(processor(images=loaded, return_tensors="pt")["pixel_values"])

    return work(torch, lambda: images(pixels), texts, files, captions)


def unit(features: Any) -> np.ndarray:
    return (features / features.norm(dim=-1, keepdim=True)).float().numpy()  # type: ignore[no-any-return]


def work(
    torch: Any,
    images: Callable[[], np.ndarray],
    texts: Callable[[list[str]], np.ndarray],
    files: Callable[[], object],
    captions: list[str],
) -> tuple[Work, Any]:
    torch.set_grad_enabled(False)
    calls: Work = {
        "image batch": images,
        "texts": lambda: texts(captions),
        "one text": lambda: texts([MEDIAN]),
        "12-megapixel files": files,
        "12-megapixel files, exact": files,
    }
    return calls, (images(), texts(captions))


def ours(name: str, folder: Path, captions: list[str], photos: list[Path]) -> tuple[Work, Any]:
    import cn_clip

    backend, precision, export = (OURS | INT8)[name]
    embedder = cn_clip.load(
        folder / (export or "clip_cn_vit-b-16.pt"),
        backend=backend,
        device="cpu",
        precision=precision,
    )
    # With the same backend: two would share the CPU.
    fast = cn_clip.Embedder(
        embedder.backend, embedder.config, fingerprint=embedder._fingerprint, fast_decode=True
    )
    pixels = np.load(folder / "pixels.npy")

    def images() -> np.ndarray:
        features = embedder.backend.run_images(pixels)
        return features / np.linalg.norm(features, axis=1, keepdims=True)  # type: ignore[no-any-return]

    calls: Work = {
        "image batch": images,
        "texts": lambda: embedder.embed_texts(captions),
        "one text": lambda: embedder.embed_texts(MEDIAN),
        "12-megapixel files": lambda: fast.embed_images(photos),
        "12-megapixel files, exact": lambda: embedder.embed_images(photos),
    }
    return calls, (images(), embedder.embed_texts(captions))


def bare(name: str, folder: Path) -> tuple[Work, Any]:
    """Return the image graph of an export in its runtime, without our code."""
    path, pixels = folder / "onnx-float32" / "image.onnx", np.load(folder / "pixels.npy")
    if name == "bare onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        return {"image batch": lambda: session.run(None, {"pixel_values": pixels})}, None
    import openvino

    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {"image batch": lambda: compiled(pixels)}, None


def contest(name: str, folder: Path) -> None:
    """Run one round for each line of stdin; print seconds by row as JSON."""
    captions = json.loads((folder / "captions.json").read_text("utf-8"))
    photos = sorted((folder / "photos").iterdir())
    if name in BARE:
        calls, embeddings = bare(name, folder)
    elif name in ("official", "transformers"):
        calls, embeddings = globals()[name](folder, captions, photos)
    else:
        calls, embeddings = ours(name, folder, captions, photos)
    if embeddings is not None:
        np.savez(folder / f"{name}.npz", images=embeddings[0], texts=embeddings[1])
    for call in calls.values():
        call()
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds = {}
        for row, call in calls.items():
            repeats = 5 if row == "one text" else 1
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds[row] = (time.perf_counter() - start) / repeats
        print(json.dumps(seconds), flush=True)


def prepare(folder: Path, weights: Path | None, int8: bool) -> None:
    """Write weights, exports, captions, photos and pixels."""
    from PIL import Image

    from cn_clip.convert import convert
    from cn_clip.errors import CNClipError
    from cn_clip.export import export
    from cn_clip.image.decode import normalize, to_pixels
    from cn_clip.sample import embedded_sample

    checkpoint = folder / "clip_cn_vit-b-16.pt"
    if weights is None:
        make_weights(checkpoint)
    else:
        checkpoint.symlink_to((weights / checkpoint.name).resolve())
    convert(checkpoint, folder / "hf", "hf")
    for runtime, precision in EXPORTS[: 3 if int8 else 1]:
        try:
            export(checkpoint, folder / f"{runtime}-{precision}", to=runtime, precision=precision)
        except CNClipError as error:
            print(f"{runtime}-{precision}: {error}", file=sys.stderr)
    sample = embedded_sample()
    (folder / "captions.json").write_text(json.dumps(sample.captions[:TEXTS]), "utf-8")
    images = [Image.open(path) for path in sample.images[:BATCH]]
    np.save(folder / "pixels.npy", np.stack([normalize(to_pixels(i, 224)) for i in images]))
    (folder / "photos").mkdir()
    for number, path in enumerate(sample.images[:PHOTOS]):
        image = Image.open(path)
        large = image.convert("RGB").resize((4000, 3000))
        large.save(folder / "photos" / f"{number}.jpg", quality=92)


def make_weights(checkpoint: Path) -> None:
    """Write random initial weights. Those of the golden tests lose far more in int8."""
    import torch

    from cn_clip import weights
    from cn_clip.config import MODELS
    from cn_clip.model.clip import CLIP, initialize

    model = CLIP(MODELS["ViT-B-16"])
    initialize(model, torch.Generator().manual_seed(0))
    weights.save_official(model, checkpoint)


def contestants(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the names of all whose export was written, bfloat16 where the CPU has it."""
    from cn_clip.processes import cpu_info

    ours = OURS | (INT8 if options.int8 else {})
    flags = " ".join(cpu_info("flags")).split()
    names = [
        name
        for name, (_, precision, made) in ours.items()
        if (not made or (folder / made).is_dir())
        and (precision != "bfloat16" or "avx512_bf16" in flags)
    ]
    peers = [*(["official"] if options.peer else []), "transformers"]
    return [*peers, *names, *(name for name, of in BARE.items() if of in names)]


def compare(options: argparse.Namespace, folder: Path) -> None:
    processes = {}
    for name in contestants(options, folder):
        # -E: a PYTHONPATH of ours would replace the official package.
        python = [options.peer, "-E"] if name == "official" else [sys.executable]
        process = subprocess.Popen(
            [*python, __file__, "--contest", name, "--folder", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert process.stdout is not None
        while (line := process.stdout.readline()) and line != "ready\n":
            pass
        if line:
            processes[name] = process
        else:
            print(f"{name}: did not start", file=sys.stderr)
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in processes}
    for _ in range(options.rounds):
        for name, process in [*processes.items()]:
            times = run_round(process)
            if times is None:
                print(f"{name}: died", file=sys.stderr)
                del processes[name], seconds[name]
                continue
            for row, value in times.items():
                seconds[name].setdefault(row, []).append(value)
    for process in processes.values():
        process.communicate()
    if not seconds:
        raise SystemExit("no contestant is left")
    print_table(seconds, folder)


def run_round(process: subprocess.Popen[str]) -> dict[str, float] | None:
    """Return seconds by row of one round, None if the process died."""
    assert process.stdin is not None and process.stdout is not None
    try:
        print("round", file=process.stdin, flush=True)
        times: dict[str, float] = json.loads(process.stdout.readline())
        return times
    except (OSError, ValueError):  # a closed pipe, or an empty line from it
        process.kill()
        process.wait()
        return None


def print_table(seconds: dict[str, dict[str, list[float]]], folder: Path) -> None:
    from cn_clip.bench import processor_name
    from cn_clip.bench.floor import measure_floors
    from cn_clip.bench.operations import image_operations
    from cn_clip.config import MODELS

    config = MODELS["ViT-B-16"]
    floors = {floor.precision: floor for floor in measure_floors(config)}
    print(f"ViT-B/16 on {processor_name()}; batch {BATCH}, {TEXTS} texts, {PHOTOS} files")
    for floor in floors.values():
        per_second = floor.gflops * 1e9 / image_operations(config)
        print(
            f"floor {floor.precision}: {floor.gflops:.0f} GFLOP/s, {per_second:.1f} images/s, "
            f"runs differ by {floor.spread:.0%}"
        )
    items = dict.fromkeys(ROWS, PHOTOS) | {"image batch": BATCH, "texts": TEXTS, "one text": 1}
    base = next(name for name in ("official", "transformers", *seconds) if name in seconds)
    reference = seconds[base]
    print(f"speed in parentheses and cosines: relative to {base}")
    print(f"{'':<24}" + "".join(f"{row + ', ' + unit:>38}" for row, unit in ROWS.items()))
    for name, rows in seconds.items():
        cells = []
        for row, unit in ROWS.items():
            if row not in rows:
                cells.append(f"{'':>38}")
                continue
            median = float(np.median(rows[row]))
            value = 1000 * median if unit == "ms" else items[row] / median
            times = f"({np.median(reference[row]) / median:5.2f}x)" if row in reference else ""
            cells.append(f"{value:>28.1f} {times:>9}")
        print(f"{name:<24}" + "".join(cells) + _cosines(name, base, folder))


def _cosines(name: str, base: str, folder: Path) -> str:
    if not all((folder / f"{one}.npz").exists() for one in (name, base)):
        return ""
    reference = np.load(folder / f"{base}.npz")
    contestant = np.load(folder / f"{name}.npz")
    smallest = [
        float((contestant[key].astype(np.float64) * reference[key]).sum(1).min())
        for key in ("images", "texts")
    ]
    return f"   cosine {smallest[0]:.6f} images, {smallest[1]:.6f} texts"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", help="a Python with the official cn-clip")
    parser.add_argument("--weights", type=Path, help="folder with clip_cn_vit-b-16.pt")
    parser.add_argument("--int8", action="store_true", help="measure int8 exports too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contest", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="keep weights and exports here for later runs")
    options = parser.parse_args()
    if options.contest:
        contest(options.contest, options.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not (folder / "photos").is_dir():  # written last
            folder.mkdir(exist_ok=True)
            prepare(folder, options.weights, options.int8)
        compare(options, folder)


if __name__ == "__main__":
    main()

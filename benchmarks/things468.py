"""468 things: zero-shot retrieval between the Tux Paint stamps and their Chinese captions.

    python benchmarks/things468.py                  # downloads the Debian package of the stamps
    python benchmarks/things468.py --stamps DIR     # .../share/tuxpaint/stamps, already unpacked
    python benchmarks/things468.py --folder animals # only these 128
    python benchmarks/things468.py --against MODEL  # gain over another model

The dataset is all stamps with a PNG and a `zh_CN.utf8=` caption outside the folder `symbols`: 468
images on white squares, with 426 distinct captions. Each caption is a query for one of 468 images,
each image for one of 426 captions; images with the same caption are all positives. Chance is 0.2 %.
Each score has a 95 % bootstrap interval of 10,000 resamples (paired, if two models are compared).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import cn_clip
from cn_clip.eval.metrics.bootstrap import paired_interval

PACKAGE = "tuxpaint-stamps-default"
CAPTION = re.compile(r"^zh_CN\.utf8=(.+)$", re.MULTILINE)


def fetch(folder: Path) -> Path:
    """Download and unpack the Debian package into ``folder``; return the folder of the stamps."""
    subprocess.run(["apt-get", "download", "-qq", PACKAGE], cwd=folder, check=True)
    (package,) = folder.glob(f"{PACKAGE}*.deb")
    subprocess.run(["dpkg", "-x", package, folder / "unpacked"], check=True)
    return folder / "unpacked/usr/share/tuxpaint/stamps"


def things(stamps: Path) -> list[tuple[Path, str]]:
    """Return images and captions in the order of their paths."""
    pairs = []
    for image in sorted(stamps.rglob("*.png")):
        note = image.with_suffix(".txt")
        if image.relative_to(stamps).parts[0] == "symbols" or not note.exists():
            continue
        caption = CAPTION.search(note.read_text("utf-8", errors="replace"))
        if caption:
            pairs.append((image, caption.group(1).strip()))
    return pairs


def on_white(path: Path) -> Image.Image:
    """Return the image on a white square: background and shape are fixed by the benchmark."""
    with Image.open(path) as image:
        layer = image.convert("RGBA")
    side = max(layer.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(layer, ((side - layer.width) // 2, (side - layer.height) // 2))
    return square.convert("RGB")


def hits(scores: np.ndarray, correct: np.ndarray) -> dict[str, np.ndarray]:
    """Return for each row 100 if a positive is among the top 1, 5 and 10, else 0."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(correct, order, axis=1)
    return {f"R@{k}": 100.0 * ranked[:, :k].any(axis=1) for k in (1, 5, 10)}


def cell(row: dict[str, np.ndarray]) -> str:
    """Return the recalls of one direction in the format of the model card."""
    return " / ".join(f"{values.mean():.1f}" for values in row.values())


def measure(model: str, pairs: list[tuple[Path, str]]) -> dict[str, dict[str, np.ndarray]]:
    """Return the hits of a model in both directions."""
    embedder = cn_clip.load(model)
    images = embedder.embed_images(on_white(path) for path, _ in pairs)
    captions = list(dict.fromkeys(caption for _, caption in pairs))
    scores = embedder.embed_texts(captions) @ images.T  # (captions, images)
    correct = np.array([[caption == other for _, other in pairs] for caption in captions])
    return {"text_to_image": hits(scores, correct), "image_to_text": hits(scores.T, correct.T)}


def with_interval(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """Return the mean difference and its interval."""
    interval = paired_interval(ours, theirs)
    values = (ours.mean() - theirs.mean(), interval.low, interval.high)
    return [round(float(value), 1) for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; default: download them")
    parser.add_argument("--folder", help="only the stamps in this top folder, such as animals")
    parser.add_argument("--model", default="mini", help="anything that cn_clip.load takes")
    parser.add_argument("--against", help="another model: print the gain over it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        stamps = options.stamps or fetch(Path(scratch))
        pairs = things(stamps)
        if options.folder:
            pairs = [p for p in pairs if p[0].relative_to(stamps).parts[0] == options.folder]
        if not pairs:
            parser.error(f"no captioned stamps in {stamps / (options.folder or '')}")
        ours = measure(options.model, pairs)
        theirs = measure(options.against, pairs) if options.against else None
    result = {
        direction: {
            name: with_interval(
                row, np.zeros_like(row) if theirs is None else theirs[direction][name]
            )
            for name, row in table.items()
        }
        for direction, table in ours.items()
    }
    captions = len({caption for _, caption in pairs})
    if options.json:
        about = {"model": options.model, "against": options.against, "images": len(pairs)}
        print(json.dumps(about | {"captions": captions} | result))
        return
    over = f" over {options.against}" if options.against else ""
    print(f"{options.model}{over}: {len(pairs)} images, {captions} distinct captions")
    for direction, table in result.items():
        row = "  ".join(
            f"{k} {v:5.1f} [{low:.1f}, {high:.1f}]" for k, (v, low, high) in table.items()
        )
        print(f"{direction.replace('_', ' '):<14} {row}")


if __name__ == "__main__":
    main()

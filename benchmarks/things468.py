"""468 things: zero-shot retrieval between the Tux Paint stamps and their Chinese captions.

    python benchmarks/things468.py                  # fetches the Debian package of the stamps
    python benchmarks/things468.py --stamps DIR     # .../share/tuxpaint/stamps, already unpacked

Every stamp with a PNG and a `zh_CN.utf8=` caption outside the folder `symbols` counts: 468
pictures with 426 distinct captions. They lie on a white square. Each distinct caption asks for
a picture among 468, each picture for its caption among 426; pictures that share a caption are all
correct. Chance is 0.2 %. Only the public API is used, so any model that `cn_clip.load` takes can be
measured.
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

PACKAGE = "tuxpaint-stamps-default"
CAPTION = re.compile(r"^zh_CN\.utf8=(.+)$", re.MULTILINE)


def fetch(folder: Path) -> Path:
    """Download and unpack the Debian package into ``folder``; return the folder of the stamps."""
    subprocess.run(["apt-get", "download", "-qq", PACKAGE], cwd=folder, check=True)
    (package,) = folder.glob(f"{PACKAGE}*.deb")
    subprocess.run(["dpkg", "-x", package, folder / "unpacked"], check=True)
    return folder / "unpacked/usr/share/tuxpaint/stamps"


def things(stamps: Path) -> list[tuple[Path, str]]:
    """Pictures and captions, in the order of their paths."""
    pairs = []
    for picture in sorted(stamps.rglob("*.png")):
        note = picture.with_suffix(".txt")
        if picture.relative_to(stamps).parts[0] == "symbols" or not note.exists():
            continue
        caption = CAPTION.search(note.read_text("utf-8", errors="replace"))
        if caption:
            pairs.append((picture, caption.group(1).strip()))
    return pairs


def on_white(path: Path) -> Image.Image:
    """The picture on a white square: the benchmark fixes background and shape, not the model."""
    with Image.open(path) as image:
        layer = image.convert("RGBA")
    side = max(layer.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(layer, ((side - layer.width) // 2, (side - layer.height) // 2))
    return square.convert("RGB")


def recall(scores: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Percent of rows with a correct column among the first 1, 5 and 10."""
    order = np.argsort(-scores, axis=1, kind="stable")
    hits = np.take_along_axis(correct, order, axis=1)
    return {f"R@{k}": round(100 * float(hits[:, :k].any(axis=1).mean()), 1) for k in (1, 5, 10)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; fetched if not given")
    parser.add_argument("--model", default="mini", help="anything that cn_clip.load takes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    embedder = cn_clip.load(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = things(options.stamps or fetch(Path(scratch)))
        if not pairs:
            parser.error(f"no captioned stamps in {options.stamps}")
        images = embedder.embed_images(on_white(path) for path, _ in pairs)
    captions = list(dict.fromkeys(caption for _, caption in pairs))
    scores = embedder.embed_texts(captions) @ images.T  # (captions, pictures)
    correct = np.array([[caption == own for _, own in pairs] for caption in captions])
    result = {
        "model": options.model,
        "pictures": len(pairs),
        "captions": len(captions),
        "text_to_image": recall(scores, correct),
        "image_to_text": recall(scores.T, correct.T),
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.model}: {len(pairs)} pictures, {len(captions)} distinct captions")
    for way in ("text_to_image", "image_to_text"):
        row = "  ".join(f"{name} {value:5.1f}" for name, value in result[way].items())
        print(f"{way.replace('_', ' '):<14} {row}")


if __name__ == "__main__":
    main()

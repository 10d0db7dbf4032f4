"""Speed of ``embed images`` (2,000 photos, with decoding) relative to the model alone.

    python benchmarks/embed.py [--photos 2000] [--model mini]

The photos are the four of examples/, cropped and compressed at random, so that all differ. Both
are timed alternately in one process; the ratio is that of the best rounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from cn_clip import load
from cn_clip.embeddings.extract import extract
from cn_clip.embeddings.inputs import read_images
from cn_clip.image.decode import normalize, read_image, to_pixels

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
BATCH = 32


def make_photos(folder: Path, count: int) -> None:
    originals = [Image.open(path).convert("RGB") for path in sorted(EXAMPLES.glob("*.jpg"))]
    random = np.random.default_rng(0)
    for index in range(count):
        image = originals[index % len(originals)]
        left, top = (int(random.integers(0, side // 8)) for side in image.size)
        cut = image.crop((left, top, image.width, image.height))
        cut.save(folder / f"{index:05}.jpg", quality=int(random.integers(80, 95)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()

    embedder = load(options.model)
    with tempfile.TemporaryDirectory() as work:
        photos = Path(work) / "photos"
        photos.mkdir()
        make_photos(photos, options.photos)
        size = embedder.config.vision.resolution
        paths = sorted(photos.iterdir())[:BATCH]
        batch = np.stack([normalize(to_pixels(read_image(path), size)) for path in paths])
        embedder._run_images(batch)
        bare, ours = [], []
        for number in range(options.rounds):
            start = time.perf_counter()
            for _ in range(options.photos // BATCH):
                embedder._run_images(batch)
            bare.append(options.photos // BATCH * BATCH / (time.perf_counter() - start))
            start = time.perf_counter()
            out = Path(work) / f"{number}.npz"
            extract(embedder, "images", read_images([str(photos)]), out)
            ours.append(options.photos / (time.perf_counter() - start))
            print(
                f"round {number + 1}: bare {bare[-1]:.1f}, embed {ours[-1]:.1f} photos per second"
            )
    print(
        f"embed images: {max(ours):.1f} per second, {max(ours) / max(bare):.0%} of the bare model"
    )


if __name__ == "__main__":
    sys.exit(main())

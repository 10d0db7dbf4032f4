"""Recall of planted near-duplicates, false removals, and the speed of the lookup.

    python benchmarks/decontaminate.py TEST_FOLDER OTHER_FOLDER [--count 500] [--lookup 1000000]

Both folders hold real images, and are searched recursively. COUNT test images are copied with six
random changes; `decontaminate` searches the copies and the other folder for test images. A
removal from the other folder may be a true near-duplicate: --report FILE.html shows them.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from cn_clip.data.curate.decontaminate import decontaminate, write_removed_report
from cn_clip.data.curate.perceptual_hash import THRESHOLD, build_index, search
from cn_clip.data.sources.base import Source
from cn_clip.data.sources.open import open_source
from cn_clip.errors import ImageError
from cn_clip.image.decode import find_images, read_image

RNG = np.random.default_rng(0)
TOGETHER = 256  # hashes that `decontaminate` looks up at once


def resized(image: Image.Image) -> Image.Image:
    factor = RNG.uniform(0.4, 1.6)
    return image.resize(tuple(max(8, round(factor * side)) for side in image.size))


def recompressed(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=int(RNG.integers(30, 80)))
    return Image.open(stream)


def cropped(image: Image.Image) -> Image.Image:
    """Crop 5 % of the width and of the height, split randomly between the sides."""
    width, height = image.size
    left, top = RNG.uniform(0, 0.05 * width), RNG.uniform(0, 0.05 * height)
    box = (left, top, left + 0.95 * width, top + 0.95 * height)
    return image.crop(tuple(round(side) for side in box))


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def shifted(image: Image.Image) -> Image.Image:
    factors, offset = RNG.uniform(0.85, 1.15, 3), RNG.uniform(-15, 15, 3)
    return Image.fromarray(np.clip(np.asarray(image) * factors + offset, 0, 255).astype(np.uint8))


def framed(image: Image.Image) -> Image.Image:
    """Add margins in the colour of the corner."""
    width, height = image.size
    left, top, right, bottom = (RNG.uniform(0, 0.6, 4) * (width, height, width, height)).astype(int)
    size = (width + left + right, height + top + bottom)
    canvas = Image.new("RGB", size, image.getpixel((0, 0)))
    canvas.paste(image, (left, top))
    return canvas


CHANGES: tuple[Callable[[Image.Image], Image.Image], ...] = (
    resized,
    recompressed,
    cropped,
    mirrored,
    shifted,
    framed,
)


def load(folder: Path, count: int) -> list[Image.Image]:
    paths = find_images([folder])
    images = []
    for at in RNG.permutation(len(paths))[:count].tolist():
        try:
            images.append(read_image(paths[at], background="white").convert("RGB"))
        except ImageError:
            continue
        images[-1].thumbnail((512, 512))  # so that thousands fit in memory
    return images


def write_source(images: list[Image.Image], folder: Path) -> Source:
    """Write images as a source of pairs, with their numbers as texts."""
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number:05}.png", compress_level=1)
    lines = [json.dumps({"image": f"{n:05}.png", "text": str(n)}) for n in range(len(images))]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return open_source(f"jsonl:{folder}/pairs.jsonl")


def measure_recall(options: argparse.Namespace, scratch: Path) -> None:
    tests = load(options.test, options.count)
    against = write_source(tests, scratch / "tests")
    print(f"{len(tests)} test images; threshold {THRESHOLD} of 256 bits")
    for change in CHANGES:
        copies = write_source([change(image) for image in tests], scratch / change.__name__)
        removed = decontaminate(copies, against, min_caption=0).removed
        matched = sum(pair.index == pair.against for pair in removed)
        print(
            f"  {change.__name__:<14} {matched:5} of {len(tests)} found: {matched / len(tests):.1%}"
        )
    others = write_source(load(options.other, options.others), scratch / "others")
    begin = time.perf_counter()
    result = decontaminate(others, against, min_caption=0)
    seconds = time.perf_counter() - begin
    fraction = len(result.removed) / len(others)
    print(
        f"  {len(result.removed)} of {len(others)} others removed: {fraction:.2%}; {seconds:.0f} s"
    )
    if options.report:
        write_removed_report(result, others, against, options.report)


def measure_lookup(options: argparse.Namespace) -> None:
    """Look up random queries, two per training image, in all variants of 30,000 test images."""
    random = np.random.default_rng(0)
    index = build_index(random.integers(0, 2**64, (900_000, 36), dtype=np.uint64))
    queries = random.integers(0, 2**64, (options.lookup, 36), dtype=np.uint64)
    begin = time.perf_counter()
    for at in range(0, len(queries), TOGETHER):
        search(index, queries[at : at + TOGETHER])
    seconds = time.perf_counter() - begin
    per_second = options.lookup / seconds
    print(
        f"lookup in 900,000 hashes: {options.lookup:,} in {seconds:.1f} s; "
        f"10 M images at this speed: {2e7 / per_second / 60:.0f} min on one core"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("test", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--others", type=int, default=4000)
    parser.add_argument("--lookup", type=int, default=200_000)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure_recall(options, Path(scratch))
    measure_lookup(options)


if __name__ == "__main__":
    main()

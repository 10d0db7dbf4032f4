"""Planted near-duplicates found, clean pictures wrongly removed, and the speed of the lookup.

    python benchmarks/decontaminate.py TEST_FOLDER OTHER_FOLDER [--count 500] [--lookup 1000000]

Both folders hold real pictures, searched through. Each of COUNT test pictures is planted in five
kinds of copies among the other folder's pictures; the copies' parameters are drawn at random. What
is "wrongly" removed of the others may be a true near-duplicate: --sheet FILE.png shows them.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from cn_clip.data.similar import THRESHOLD, build, hash_image, search, variants
from cn_clip.errors import ImageError
from cn_clip.image import find_images, read_image

RNG = np.random.default_rng(0)


def resized(image: Image.Image) -> Image.Image:
    factor = RNG.uniform(0.4, 1.6)
    return image.resize(tuple(max(8, round(factor * side)) for side in image.size))


def recompressed(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=int(RNG.integers(30, 80)))
    return Image.open(stream)


def cropped(image: Image.Image) -> Image.Image:
    """Without 5 % of its width and of its height, at the sides by chance."""
    width, height = image.size
    left, top = RNG.uniform(0, 0.05 * width), RNG.uniform(0, 0.05 * height)
    box = (left, top, left + 0.95 * width, top + 0.95 * height)
    return image.crop(tuple(round(side) for side in box))


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def shifted(image: Image.Image) -> Image.Image:
    factors, offset = RNG.uniform(0.85, 1.15, 3), RNG.uniform(-15, 15, 3)
    return Image.fromarray(np.clip(np.asarray(image) * factors + offset, 0, 255).astype(np.uint8))


KINDS: tuple[Callable[[Image.Image], Image.Image], ...] = (
    resized,
    recompressed,
    cropped,
    mirrored,
    shifted,
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


def measure_found(options: argparse.Namespace) -> None:
    tests = load(options.test, options.count)
    begin = time.perf_counter()
    several = [np.stack([hash_image(each) for each in variants(image)]) for image in tests]
    took = (time.perf_counter() - begin) / len(tests)
    index = build(np.concatenate(several))
    owners = np.repeat(np.arange(len(tests)), [len(each) for each in several])
    print(
        f"{len(tests)} test pictures, {len(several[0])} hashes and {took * 1e3:.1f} ms each;",
        end="",
    )
    print(f" threshold {THRESHOLD} of 256 bits")
    for change in KINDS:
        copies = np.stack([hash_image(change(image)) for image in tests])
        asked, held, _ = search(index, copies)
        found = len(np.unique(asked[owners[held] == asked]))
        print(f"  {change.__name__:<14} {found:5} of {len(tests)} found: {found / len(tests):.1%}")
    others = load(options.other, options.others)
    asked, held, distances = search(index, np.stack([hash_image(image) for image in others]))
    removed = np.unique(asked)
    print(f"  {len(removed)} of {len(others)} others removed: {len(removed) / len(others):.2%}")
    if options.sheet and len(removed):
        sheet = Image.new("RGB", (260, 130 * len(removed)), "gray")
        for row, other in enumerate(removed.tolist()):
            best = min(np.flatnonzero(asked == other).tolist(), key=lambda at: int(distances[at]))
            for column, image in enumerate((tests[owners[held[best]]], others[other])):
                small = image.copy()
                small.thumbnail((128, 128))
                sheet.paste(small, (130 * column, 130 * row))
        sheet.save(options.sheet)


def measure_lookup(options: argparse.Namespace) -> None:
    """30,000 test pictures in all their variants, with and without margins, against so many random
    queries, of which a training picture has two."""
    random = np.random.default_rng(0)
    index = build(random.integers(0, 2**64, (900_000, 36), dtype=np.uint64))
    queries = random.integers(0, 2**64, (options.lookup, 36), dtype=np.uint64)
    begin = time.perf_counter()
    search(index, queries)
    seconds = time.perf_counter() - begin
    rate = options.lookup / seconds
    print(
        f"lookup in 900,000 hashes: {options.lookup:,} in {seconds:.1f} s; "
        f"of 10 M pictures at this rate: {2e7 / rate / 60:.0f} min on one core"
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
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    measure_found(options)
    measure_lookup(options)


if __name__ == "__main__":
    main()

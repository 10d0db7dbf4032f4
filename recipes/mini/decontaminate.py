"""Find training pictures that repeat a picture of the benchmark, so that the recipe can skip them.

    python recipes/mini/decontaminate.py --work DIR

This is the only script here that opens the Tux Paint stamps, and it takes nothing from them but a
difference hash of their pixels (their captions are not read). It writes `data/excluded.txt`, which
is part of the repository: `build.py` reads that list and never sees the stamps.

A picture is excluded if its 256-bit difference hash, upright or mirrored, is within 28 bits of a
stamp's; unrelated pictures are some 100 bits apart, the copies found at most 8. The hash is of the
drawing cut to its own bounds, so margins do not hide a copy.
"""

import argparse
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from build import DATA, all_pictures, fetch_packages
from pictures import on_white
from PIL import Image, ImageChops, ImageOps

NEAR = 28
STAMPS = "tuxpaint-stamps-default"


def difference_hash(image: Image.Image) -> np.ndarray:
    """256 bits: is each of 16 x 16 cells brighter than its right neighbour?"""
    bounds = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    grey = image.crop(bounds).convert("L").resize((17, 16), Image.Resampling.BICUBIC)
    cells = np.asarray(grey, np.int16)
    return (cells[:, :-1] > cells[:, 1:] + 2).ravel()


def hashes(data: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """The hash of a picture and of its mirror image; None if it cannot be drawn or is blank."""
    try:
        image = on_white(data)
    except Exception:
        return None
    if np.asarray(image).std() < 2:
        return None
    return difference_hash(image), difference_hash(ImageOps.mirror(image))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    fetch_packages(work)
    folder = work / "stamps"
    if not folder.exists():
        folder.mkdir()
        subprocess.run(["apt-get", "download", "-qq", STAMPS], cwd=folder, check=True)
        (package,) = folder.glob("*.deb")
        subprocess.run(["dpkg", "-x", package, folder / "unpacked"], check=True)
    root = folder / "unpacked/usr/share/tuxpaint/stamps"
    # The folder of letters, coins and signs is no part of the benchmark; its plain squares would
    # be "near" every flag.
    paths = sorted(root.rglob("*.png"))
    stamps = [path for path in paths if path.relative_to(root).parts[0] != "symbols"]
    pictures = list(all_pictures(work, excluded=frozenset()))
    with ProcessPoolExecutor(2) as pool:
        stamp_hashes = list(pool.map(hashes, [p.read_bytes() for p in stamps], chunksize=16))
        picture_hashes = list(pool.map(hashes, [p.data for p in pictures], chunksize=16))
    known = [(p, h[0]) for p, h in zip(stamps, stamp_hashes, strict=True) if h is not None]
    table = np.stack([h for _, h in known])
    lines = []
    for picture, pair in zip(pictures, picture_hashes, strict=True):
        if pair is None:
            continue
        distance = np.minimum(*((table != h).sum(1) for h in pair))
        nearest = int(distance.argmin())
        if distance[nearest] <= NEAR:
            stamp = known[nearest][0]
            name = stamp.relative_to(root)
            lines.append(f"{picture.source}\t{picture.key}\t{name}\t{distance[nearest]}")
    header = "# source, picture, nearest Tux Paint stamp, bits apart; written by decontaminate.py\n"
    (DATA / "excluded.txt").write_text(header + "\n".join(sorted(lines)) + "\n", "utf-8")
    print(f"{len(lines)} of {len(pictures)} pictures excluded ({len(known)} stamps)")


if __name__ == "__main__":
    main()

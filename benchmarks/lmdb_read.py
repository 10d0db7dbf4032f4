"""The cost of reading an LMDB without the lmdb library, one pair at a time in random order.

    python benchmarks/lmdb_read.py [--images 4000] [--texts 100]

An LMDB of JPEGs of 640 x 480 pixels, with TEXTS texts each, is written once. Pairs are read
from the page cache, by lmdb, pickle and base64 as in the official package, and by ``cn_clip``;
images are decoded and resized for comparison. CPU time, best of three rounds.
"""

from __future__ import annotations

import argparse
import base64
import io
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image

from cn_clip.data.sources.lmdb import Lmdb, write_lmdb
from cn_clip.data.sources.tar import Sample
from cn_clip.image.decode import read_image, to_pixels

READ = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--texts", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        photos = [photo(seed) for seed in range(20)]
        write_lmdb(
            root,
            (
                Sample(photos[n % 20], ".jpg", f"{n:07}", [(f"{n}-{t}", "一只猫") for t in texts])
                for n, texts in ((n, range(options.texts)) for n in range(options.images))
            ),
        )
        source = Lmdb("lmdb", root)
        order = np.random.default_rng(0).integers(0, len(source), READ).tolist()
        images, pairs = (lmdb.open(f"{root}/{p}", readonly=True) for p in ("imgs", "pairs"))

        def official(index: int) -> object:
            with pairs.begin() as transaction:
                image_id, text_id, text = pickle.loads(transaction.get(str(index).encode()))
            with images.begin() as transaction:
                return base64.urlsafe_b64decode(transaction.get(image_id.encode())), text_id, text

        def ours(index: int) -> object:
            return source.image(index), source.row(index)

        content = [source.image(index) for index in order[:200]]
        library, own = (best(read, order) for read in (official, ours))
        decode = best(lambda photo: to_pixels(read_image(photo), 224), content)
        print(f"lmdb {lmdb.__version__}, {len(source):,} pairs of {len(photos[0]):,} bytes")
        print(
            f"lmdb library {library:.0f} us per pair, cn_clip {own:.0f} us ({own / library:.1f} x)"
        )
        print(
            f"decode and resize {decode:.0f} us: a pair costs {1 + (own - library) / decode:.3f} x"
        )


def photo(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()


def best(read: Callable[..., object], items: list[object]) -> float:
    """Return the CPU time per item in microseconds."""
    rounds = []
    for _ in range(3):
        started = time.process_time()
        for item in items:
            read(item)
        rounds.append((time.process_time() - started) / len(items) * 1e6)
    return min(rounds)


if __name__ == "__main__":
    main()

"""What the steps of a run over embedding shards cost for one image, for docs/billion.toml.

    python benchmarks/billion.py --folder DIR    # after search_shards.py --folder DIR --step build

Prints seconds of one thread: an image of 384 pixels (the longer side, as img2dataset keeps them)
decoded and prepared for a model of 224; a pair compared by the similarity filter; an image compared
with its near-duplicates, over a hundredth of the lists of the index in DIR; and the bytes of a row
of metadata, and of a manifest. The images are smooth noise with fine grain, in JPEG of such quality
that they have as many bytes as those of LAION-5B on average.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from embedding_generator import Generator
from PIL import Image

from cn_clip.backends.pipeline import ImagePreparation
from cn_clip.bench import processor_name
from cn_clip.config import MODELS
from cn_clip.shards.index import ShardIndex
from cn_clip.shards.near_duplicates import THRESHOLD, CompareLists
from cn_clip.shards.similarity import pair_cosines

IMAGES, SIDE, IMAGE_BYTES = 64, 384, 37_500
ROWS = 10_000


def photo(seed: int) -> bytes:
    """Return a JPEG of 384 x 288 of about ``IMAGE_BYTES`` bytes."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((SIDE, SIDE * 3 // 4), Image.Resampling.BICUBIC), np.int16)
    grain = rng.normal(0, 6, smooth.shape).astype(np.int16)
    image = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
    best = b""
    for quality in range(60, 97, 2):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        best = stream.getvalue()
        if len(best) >= IMAGE_BYTES:
            break
    return best


def seconds(run: object, count: int) -> float:
    """Return the least CPU time of three runs, for one of ``count`` items."""
    times = []
    for _round in range(3):
        start = time.process_time()
        run()  # type: ignore[operator]
        times.append(time.process_time() - start)
    return min(times) / count


def row_bytes() -> tuple[float, int]:
    """Return the bytes of a row of metadata, and of a manifest."""
    numbers = range(ROWS)
    paths = [f"tar:s3://bucket/shards/{n // 5000:06d}.tar#{n:09d}" for n in numbers]
    words = "一只可爱的小猫坐在海边的木椅上看着远处的日落和渔船"
    rng = np.random.default_rng(0)
    captions = ["".join(rng.permutation(list(words))[: rng.integers(8, 24)]) for _n in numbers]
    table = {"id": paths, "image_path": paths, "caption": captions}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metadata.parquet"
        pyarrow.parquet.write_table(pyarrow.table(table), path)
        size = path.stat().st_size / ROWS
    files = {f"img_emb/img_emb_{1:05}.npy": {"sha256": "0" * 64, "bytes": ROWS * 768}} | {
        f"metadata/metadata_{1:05}.parquet": {"sha256": "0" * 64, "bytes": 10**6}
    }
    return size, len(json.dumps({"files": files} | {f"field{n}": "0" * 24 for n in range(12)}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="of search_shards.py, with its index")
    options = parser.parse_args()
    print(f"# {processor_name()}, load {os.getloadavg()[0]:.1f}")
    images = [photo(seed) for seed in range(IMAGES)]
    prepare = ImagePreparation(MODELS["ViT-B-16"], False, 1 << 26)
    print(f"image_bytes = {np.mean([len(each) for each in images]):.0f}")
    decode = seconds(lambda: [prepare(each) for each in images], IMAGES)
    print(f"decode_seconds = {decode:.3g}")
    pairs = [rows.astype(np.float16) for rows in Generator(dim=384).pairs(
        ROWS, np.random.default_rng(0))]  # fmt: skip
    print(f"filter_seconds = {seconds(lambda: pair_cosines(*pairs), ROWS):.3g}")
    metadata, manifest = row_bytes()
    print(f"metadata_bytes = {metadata:.0f}\nmanifest_bytes = {manifest}")
    if options.folder is not None:
        index = ShardIndex.open(options.folder)
        assert index.lists is not None
        nlist = index.lists.index.nlist
        lists = range(max(1, nlist // 100))
        rows = sum(index.lists.index.invlists.list_size(number) for number in lists)
        start = time.process_time()
        found = CompareLists(options.folder, THRESHOLD, False, None)(lists)
        print(f"dedupe_seconds = {(time.process_time() - start) / rows:.3g}")
        print(f"# {len(found)} of {rows:,} images have a near-duplicate")


if __name__ == "__main__":
    main()

"""Pairs per second and memory of every source, compared with the official dataset and webdataset.

    python benchmarks/data.py --peer OTHER/bin/python [--stamps FOLDER] [--count 500]
    python benchmarks/data.py --large    # instead: a manifest of 10 M rows, a tar of 1 GB

The peer is a Python with the official `cn-clip`, `lmdb`, `timm` and `webdataset`. The same images,
Tux Paint's stamps as JPEG of several sizes, are packed into every format. Every measurement is its
own process with one thread and no workers; they alternate, and the best round counts. Both sides
decode, preprocess to 224 pixels and tokenise, in batches of 64.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

BATCH, SIZE = 64, 224
SIDES = {"256": 256, "640": 640, "3000": 3000}  # longer side of the images, in pixels
OURS = ["folder", "csv", "jsonl", "parquet", "tsv", "lmdb", "tar"]


def source_uri(root: Path, kind: str) -> str:
    return {
        "folder": f"folder:{root}/pictures",
        "csv": f"csv:{root}/pictures/pairs.csv",
        "jsonl": f"jsonl:{root}/pictures/pairs.jsonl",
        "parquet": f"parquet:{root}/pictures/pairs.parquet",
        "tsv": f"tsv:{root}/tsv/train_imgs.tsv",
        "lmdb": f"lmdb:{root}/lmdb",
        "tar": f"tar:{root}/tar/*.tar",
    }[kind]


def ours(kind: str, root: Path, fast_decode: bool) -> Iterable[int]:
    from cn_clip.data.loading.loader import Loader, Preparation
    from cn_clip.data.sources.open import open_mix

    loader = Loader(
        open_mix([source_uri(root, kind)]),
        Preparation(SIZE, fast_decode=fast_decode),
        BATCH,
        workers=0,
    )
    for epoch in range(1000):
        for batch in loader.batches(epoch):
            yield len(batch.rows)


def official(root: Path) -> Iterable[int]:
    from cn_clip.training.data import LMDBDataset
    from torch.utils.data import DataLoader

    dataset = LMDBDataset(str(root / "lmdb"), split="train", max_txt_length=52, resolution=SIZE)
    for _ in range(1000):
        for images, _, _ in DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=0):
            yield len(images)


def webdataset(root: Path) -> Iterable[int]:
    import webdataset as wds

    from cn_clip.clip import image_transform, tokenize

    transform = image_transform(SIZE)
    shards = sorted(map(str, (root / "tar").glob("*.tar")))
    dataset = (
        wds.WebDataset(shards, shardshuffle=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: tokenize([text])[0])
        .batched(BATCH)
    )
    for _ in range(1000):
        for images, _ in dataset:
            yield len(images)


def measure(what: str, root: Path, seconds: float) -> None:
    import torch

    torch.set_num_threads(1)
    side, _, how = what.partition("/")
    if side == "official":
        batches = official(root)
    elif side == "webdataset":
        batches = webdataset(root)
    else:
        batches = ours(side, root, how == "fast")
    before = peak_memory()
    stream = iter(batches)
    next(stream)  # opening, and the first batch
    start, pairs = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        pairs += next(stream)
    per_second = pairs / (time.perf_counter() - start)
    print(json.dumps({"per_second": per_second, "peak": peak_memory() - before}))


def peak_memory() -> float:
    """Return the peak memory of this process in MB; ru_maxrss may include its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if platform.system() == "Darwin" else 1e3)


def prepare(stamps: Path, root: Path, side: int, count: int) -> None:
    """Pack the same pairs into every format."""
    import csv

    import pyarrow
    import pyarrow.parquet
    from PIL import Image
    from things468 import things

    from cn_clip.data.pack import pack
    from cn_clip.data.sources.open import open_source
    from cn_clip.image.decode import read_image

    pictures = root / "pictures"
    pictures.mkdir(parents=True)
    rows = []
    for number, (path, caption) in enumerate(things(stamps)[:count]):
        image = read_image(path, background="white").convert("RGB")
        factor = side / max(image.size)
        size = tuple(max(1, round(length * factor)) for length in image.size)
        image.resize(size, Image.Resampling.BICUBIC).save(pictures / f"{number}.jpg", quality=92)
        (pictures / f"{number}.txt").write_text(caption, encoding="utf-8")
        rows.append({"image": f"{number}.jpg", "text": caption})
    with (pictures / "pairs.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["image", "text"])
        writer.writeheader()
        writer.writerows(rows)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (pictures / "pairs.jsonl").write_text(text, encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), pictures / "pairs.parquet")
    source = open_source(f"csv:{pictures}/pairs.csv")
    for to in ("tar", "tsv", "lmdb"):
        pack(source, root / to, to=to)


def run(python: list[str], what: str, root: Path, seconds: float) -> dict[str, float]:
    command = [*python, __file__, "--measure", what]
    command += ["--root", str(root), "--seconds", str(seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compare_peers(options: argparse.Namespace, scratch: Path) -> None:
    from things468 import fetch

    stamps = options.stamps or fetch(scratch)
    print(f"pairs per second on one core, {SIZE} pixels; best of {options.rounds} rounds; ", end="")
    print(f"{platform.machine()}, Python {sys.version.split()[0]}")
    for name, pixels in SIDES.items():
        root = scratch / name
        prepare(stamps, root, pixels, options.count if pixels < 1000 else min(options.count, 100))
        peers = ["official", "webdataset"] if options.peer else []
        sides = [*peers, *OURS, "tar/fast"]
        best = {side: {"per_second": 0.0, "peak": float("inf")} for side in sides}
        for _ in range(options.rounds):
            for side in sides:
                # -E: a PYTHONPATH of ours would replace the official package.
                python = [options.peer, "-E"] if side in peers else [sys.executable]
                result = run(python, side, root, options.seconds)
                best[side]["per_second"] = max(best[side]["per_second"], result["per_second"])
                best[side]["peak"] = min(best[side]["peak"], result["peak"])
        print(f"\nlonger side {pixels:,} pixels {'pairs/s':>18} {'MB':>7}", end="")
        print("".join(f" {'x ' + peer:>14}" for peer in peers))
        for side in sides:
            per_second, peak = best[side]["per_second"], best[side]["peak"]
            ratios = "".join(f" {per_second / best[peer]['per_second']:14.2f}" for peer in peers)
            print(f"{side:<24} {per_second:18,.0f} {peak:7,.0f}{ratios}")


def measure_large(what: str, root: Path) -> None:
    """Open a large source and read rows across it; print the seconds and the memory."""
    from cn_clip.data.sources.open import open_source

    before = peak_memory()
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        source = open_source(f"{root}/{what}")
        seconds.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    step = max(1, len(source) // 200_000)
    for index in range(0, len(source), step):
        source.row(index)
    row = (time.perf_counter() - begin) / len(range(0, len(source), step))
    peak = peak_memory() - before
    first, again = seconds
    print(f"{what:<16} {len(source):12,} {first:9.2f} {again:9.3f} {row * 1e6:7.0f} {peak:7,.0f}")


def large(scratch: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    from cn_clip.data.shard import write_shard
    from cn_clip.data.sources.tar import Sample

    columns: dict[str, list[str]] = {"image": [], "text": []}
    writer = None
    with (
        (scratch / "pairs.csv").open("w", encoding="utf-8") as csv,
        (scratch / "pairs.jsonl").open("w", encoding="utf-8") as jsonl,
    ):
        csv.write("image,text\n")
        for number in range(10_000_000):
            image = f"pictures/{number % 10_000:04}/{number:010}.jpg"
            text = f"第{number}张图片，一只坐在窗边晒太阳的猫"
            csv.write(f"{image},{text}\n")
            jsonl.write(f'{{"image": "{image}", "text": "{text}"}}\n')
            columns["image"].append(image)
            columns["text"].append(text)
            if len(columns["image"]) == 1_000_000:
                table = pyarrow.table(columns)
                if writer is None:
                    writer = pyarrow.parquet.ParquetWriter(scratch / "pairs.parquet", table.schema)
                writer.write_table(table)
                columns = {"image": [], "text": []}
    writer.close()  # type: ignore[union-attr]
    noise = os.urandom(16_000)
    samples = (
        Sample(noise, ".jpg", f"{number}", [(f"{number}", "一只坐在窗边晒太阳的猫")])
        for number in range(55_000)
    )
    write_shard(scratch / "large.tar", samples)
    print(f"{'':<16} {'pairs':>12} {'open, s':>9} {'again, s':>9} {'row, us':>7} {'MB':>7}")
    for what in ("pairs.csv", "pairs.jsonl", "pairs.parquet", "large.tar"):
        command = [sys.executable, __file__, "--measure", f"large/{what}", "--root", str(scratch)]
        subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", help="a Python with the official cn-clip and webdataset")
    parser.add_argument("--stamps", type=Path, help="Tux Paint's stamps; downloaded by default")
    parser.add_argument("--large", action="store_true", help="measure large sources, ours only")
    parser.add_argument("--count", type=int, default=468)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure and options.measure.startswith("large/"):
        measure_large(options.measure.removeprefix("large/"), options.root)
        return
    if options.measure:
        measure(options.measure, options.root, options.seconds)
        return
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["CN_CLIP_CACHE"] = scratch
        if options.large:
            large(Path(scratch))
        else:
            compare_peers(options, Path(scratch))


if __name__ == "__main__":
    main()

"""Training data at the size of the published run: index, memory, start, order.

    python benchmarks/data_scale.py --folder SCRATCH [--pairs 1000000] [--peer OTHER/src]
    python benchmarks/data_scale.py --folder SCRATCH --exactly-once    # only epochs with kills
    python benchmarks/data_scale.py --folder SCRATCH --remote          # only an object store
    python benchmarks/data_scale.py --folder SCRATCH --peers OTHER/bin/python  # only other loaders

It writes shards of tiny images to SCRATCH (3.6 GB for a million pairs) in the format of
img2dataset, and removes them. Twenty times as many pairs are hard links of these shards, with
indexes of unique ids and captions; 200 times as many are links of shards and indexes. The peer is
the source folder of another version of cn_clip, whose index is built from the same shards. Every
measurement is its own process.

``--remote`` compares shards of 256-pixel JPEGs on this disk with the same behind the server of
tests/data/object_server.py, another process on the same cores, which waits 20 ms before each
answer: by S3 and by HTTP, decoded to 224 pixels and not decoded, from an empty cache of blocks.

``--peers`` compares the reading of 640-pixel JPEGs with webdataset, from the same shards, and with
mosaicml-streaming, from the same samples in its format; OTHER is a Python with both.

Memory is private memory (USS): what a process does not share, as /proc/PID/smaps_rollup has it.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PER_SHARD = 10_000
WORDS = "猫狗一只红色的汽车在街上跑步女人男孩山水风景照片高清壁纸新款时尚连衣裙2021春夏"
BATCH = 512
CASES = [(world, workers) for world in (1, 2, 4) for workers in (0, 2)]  # of each process


def write_shard(path: Path, first: int, count: int, images: list[bytes]) -> None:
    """Write a shard as img2dataset does."""
    rng = random.Random(first)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(first, first + count):
            key, text = f"{number:09}", "".join(rng.choices(WORDS, k=rng.randint(6, 40)))
            values = {
                "caption": text,
                "url": f"https://images.example.com/{number}/{rng.randrange(1 << 40)}.jpg",
                "key": key,
                "status": "success",
                "error_message": None,
                "width": 256,
                "height": 256,
                "original_width": 800,
                "original_height": 600,
                "exif": "{}",
                "sha256": f"{rng.getrandbits(256):064x}",
            }
            members = {
                ".jpg": images[number % len(images)],
                ".json": json.dumps(values, ensure_ascii=False).encode(),
                ".txt": text.encode(),
            }
            for suffix, content in members.items():
                info = tarfile.TarInfo(key + suffix)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def tiny_images(side: int = 8) -> list[bytes]:
    import numpy as np
    from PIL import Image

    images = []
    for seed in range(100):
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=30)
        images.append(stream.getvalue())
    return images


def write_shards(folder: Path, pairs: int) -> None:
    folder.mkdir(parents=True)
    images = tiny_images()
    for shard in range(pairs // PER_SHARD):
        write_shard(folder / f"{shard:05}.tar", shard * PER_SHARD, PER_SHARD, images)


def link_shards(real: Path, linked: Path, times: int, *, unique: bool) -> None:
    """Link the shards under other names, each with an index of ``unique`` ids and captions, or with
    a link to that of the shard."""
    import numpy as np

    from cn_clip.data.sources import tar
    from cn_clip.data.sources.array_file import write_arrays
    from cn_clip.data.sources.index_cache import index_name
    from cn_clip.data.sources.shard_file import LocalFile

    linked.mkdir()
    shards = [tar.Tar(path) for path in sorted(real.glob("*.tar"))]
    for number in range(times * len(shards)):
        shard = shards[number % len(shards)]
        index = shard._index()
        assert shard._index_path is not None
        link = linked / f"{number:05}.tar"
        os.link(shard.name.removeprefix("tar:"), link)
        file = LocalFile(link)
        name = index_name(file.short_name, file.identity, shard.state) + tar._INDEX_SUFFIX
        target = shard._index_path.with_name(name)
        if not unique:
            os.link(shard._index_path, target)
            continue
        ids = range(number * PER_SHARD, (number + 1) * PER_SHARD)
        keys = np.random.default_rng(number).integers(0, 1 << 63, PER_SHARD).astype(np.uint64)
        names = np.frombuffer(b"".join(b"%09d" % id for id in ids), np.uint8)
        write_arrays(target, index.arrays | {"id": names, "caption_key": keys}, index.values)


def private_mb(pid: int | str = "self") -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kept = [line for line in text.splitlines() if line.startswith(("Private_Clean", "Private_D"))]
    return sum(int(line.split()[1]) for line in kept) / 1e3


def build(folder: Path, workers: int) -> dict[str, float]:
    """Open all shards for the first time."""
    from cn_clip.data.sources.open import open_source

    start, cpu = time.perf_counter(), sum(os.times()[:4])
    try:
        source = open_source(f"tar:{folder}/*.tar", workers=workers)
    except TypeError:  # an older version
        source = open_source(f"tar:{folder}/*.tar")
    seconds = time.perf_counter() - start
    cpu = sum(os.times()[:4]) - cpu
    index = Path(os.environ["CN_CLIP_CACHE"]) / "index"
    size = sum(file.stat().st_size for file in index.iterdir())
    pairs = len(source)
    return {"us": seconds / pairs * 1e6, "cpu_us": cpu / pairs * 1e6, "bytes": size / pairs}


def first_batch(folder: Path, order: str, start: int, workers: int) -> dict[str, float]:
    """Open all shards, check for contamination, and load a batch; then 20 more."""
    import numpy as np

    from cn_clip.data.loading.loader import Loader, Preparation
    from cn_clip.data.sources.open import open_mix
    from cn_clip.eval.dataset import eval_set_of
    from cn_clip.train.validation import shared_pairs

    begin = time.perf_counter()
    suffix = "?order=stream" if order == "stream" else ""
    mix = open_mix([f"tar:{folder}/*.tar{suffix}"])
    opened = time.perf_counter() - begin
    validation = eval_set_of(open_mix([f"jsonl:{folder.parent}/val/pairs.jsonl"]))
    shared_pairs(validation, mix)
    checked = time.perf_counter() - begin
    loader = Loader(mix, Preparation(32), BATCH, workers=workers, seed=1)
    batches = loader.batches(0, start)
    next(batches)
    ready = time.perf_counter() - begin
    for _ in range(20):
        next(batches)
    memory = {"private": private_mb()}
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    own = [private_mb(child) for child in children]
    if own:
        memory["worker"] = float(np.max(own))
    return {
        "open": opened,
        "checked": checked,
        "first": ready,
        "pairs": len(mix[0].source),
        **memory,
    }


def mixing() -> None:
    """Print the correlation of the shard numbers of neighbours, over 100 batches of 4,096."""
    import numpy as np

    from cn_clip.data.loading.sampler import Plan
    from cn_clip.data.loading.stream_plan import StreamPlan

    shards, size = 2000, 4096
    pairs = shards * PER_SHARD
    lengths = [np.full(shards, PER_SHARD)]
    plans = {
        "random": Plan((pairs,), (pairs,), 1),
        "stream": StreamPlan([pairs], [pairs], 1, shards=lengths, global_batch_size=size),
    }
    print(f"{'mixing':<24} {'correlation':>12} {'shards a batch':>15}")
    for name, plan in plans.items():
        numbers = [
            plan.pairs_at(0, np.arange(batch * size, (batch + 1) * size))[1] // PER_SHARD
            for batch in range(0, 4000, 40)
        ]
        all_ = np.concatenate([np.stack([each[:-1], each[1:]]) for each in numbers], axis=1)
        distinct = np.mean([len(np.unique(each)) for each in numbers])
        print(f"{name:<24} {np.corrcoef(all_)[0, 1]:12.3f} {distinct:15.0f}")


def consume(folder: Path, order: str, rank: int, world: int, workers: int, log: Path) -> None:
    """Load an epoch from the batch after the last in the log, and log the ids of each batch."""
    from cn_clip.data.loading.loader import Loader, Preparation
    from cn_clip.data.sources.open import open_mix

    done = len(log.read_text().splitlines()) if log.exists() else 0
    suffix = "?order=stream" if order == "stream" else ""
    loader = Loader(
        open_mix([f"tar:{folder}/*.tar{suffix}"]),
        Preparation(8),
        64,
        rank=rank,
        world_size=world,
        workers=workers,
        seed=1,
    )
    with log.open("a") as stream:
        for batch in loader.batches(0, done):
            stream.write(" ".join(row.image_id for row in batch.rows) + "\n")
            stream.flush()


def exactly_once(root: Path, kills: int) -> None:
    """Kill each process after random batches, and start it again, until the epoch is over.

    The processes are forked, so that a start takes no time; what is killed is a real process.
    """
    folder, shards, pairs = root / "few", 8, 1000
    folder.mkdir(parents=True)
    for number in range(shards):
        write_shard(folder / f"{number:05}.tar", number * pairs, pairs, tiny_images())
    fork = multiprocessing.get_context("fork")
    rng = random.Random(0)
    expected: dict[str, list[str]] = {}
    print(
        f"{'an epoch with kills':<24} {'processes':>9} {'workers':>8} {'kills':>6}"
        f" {'pairs':>8} {'missing':>8} {'twice':>6}  batches"
    )
    for order, (world, workers) in itertools.product(("random", "stream"), CASES):
        killed = 0
        logs = [root / f"{order}-{world}-{workers}-{rank}.log" for rank in range(world)]
        for rank, log in enumerate(logs):
            while True:
                arguments = (folder, order, rank, world, workers, log)
                process = fork.Process(target=consume, args=arguments)
                process.start()
                if killed >= kills * (rank + 1) // world:
                    process.join()
                    break
                batches = lines_of(log) + rng.randint(0, 6)
                while process.is_alive() and lines_of(log) < batches:
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.05))
                if not process.is_alive():
                    break
                process.kill()
                process.join()
                killed += 1
                whole = log.read_bytes() if log.exists() else b""
                log.write_bytes(whole[: whole.rfind(b"\n") + 1])
            if process.exitcode:
                raise SystemExit(f"process {rank} failed")
        lines = [log.read_text().splitlines() for log in logs]
        batches_read = [" ".join(parts) for parts in zip(*lines, strict=True)]
        ids = [id for batch in batches_read for id in batch.split()]
        same = batches_read == expected.setdefault(order, batches_read)
        print(
            f"{order:<24} {world:9} {workers:8} {killed:6} {len(ids):8,} "
            f"{shards * pairs - len(set(ids)):8,} {len(ids) - len(set(ids)):6,}"
            f"  {'equal' if same else 'DIFFERENT'}",
            flush=True,
        )


def lines_of(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def compare_peers(root: Path, python: str) -> None:
    """Compare the reading of 640-pixel JPEGs with other loaders, with two workers each."""
    folder = root / "shards"
    folder.mkdir(parents=True)
    images = photos(640)
    for shard in range(16):
        write_shard(folder / f"{shard:05}.tar", shard * 500, 500, images)
    measure("mosaic", root, python=python)  # writes the same samples in its format
    sides = {
        "ours, stream": ("throughput", f"tar:{folder}/*.tar?order=stream", None),
        "ours, random": ("throughput", f"tar:{folder}/*.tar", None),
        "webdataset": ("peer-webdataset", folder, python),
        "mosaicml-streaming": ("peer-mosaic", root / "mosaic", python),
    }
    measure("throughput", sides["ours, random"][1], "read", 0.1)  # builds the index
    units = {"per_second": "pairs/s", "per_cpu_second": "pairs/CPU s"}
    best: dict[tuple[str, str], dict[str, float]] = {}
    for _round in range(2):
        for what in ("decoded", "read"):
            for name, (command, place, runner) in sides.items():
                found = measure(command, place, what, 5, python=runner)
                kept = best.setdefault((what, name), found)
                kept |= {unit: max(kept[unit], found[unit]) for unit in units}
    print(f"{'640 pixels, 2 workers':<24} {'':<10}", end="")
    print("".join(f" {unit:>12} {'ours are x':>10}" for unit in units.values()))
    for (what, name), found in best.items():
        ours = {unit: best[what, "ours, stream"][unit] / found[unit] for unit in units}
        numbers = "".join(f" {found[unit]:12,.0f} {ours[unit]:10.2f}" for unit in units)
        print(f"{name:<24} {what:<10}{numbers}")


def write_mosaic(root: Path) -> dict[str, float]:
    """Write the samples of the shards for mosaicml-streaming."""
    from streaming import MDSWriter

    from cn_clip.data.sources.open import open_source

    source = open_source(f"tar:{root}/shards/*.tar")
    columns = {"jpg": "bytes", "txt": "str"}
    with MDSWriter(out=str(root / "mosaic"), columns=columns, size_limit=1 << 26) as writer:
        for index in range(len(source)):
            writer.write({"jpg": source.image(index), "txt": source.row(index).text})
    return {}


def peer_batches(peer: str, folder: Path, what: str) -> Iterator[Any]:
    """Yield the batches of 64 of another loader: pixels and token ids, or bytes and texts."""
    from PIL import Image
    from torch.utils.data import DataLoader

    from cn_clip.clip import image_transform, tokenize

    transform = image_transform(224)

    def prepared(content: bytes, text: str) -> Any:
        if what == "read":
            return content, text
        return transform(Image.open(io.BytesIO(content))), tokenize([text])[0]

    collate = list if what == "read" else None
    if peer == "webdataset":
        import webdataset

        dataset = (
            webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=16)
            .shuffle(1000)
            .to_tuple("jpg", "txt")
            .map(lambda pair: prepared(pair[0], pair[1].decode()))
        )
        return iter(DataLoader(dataset, 64, num_workers=2, collate_fn=collate))
    from streaming import StreamingDataset

    class Pairs(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            return prepared(sample["jpg"], sample["txt"])

    dataset = Pairs(local=str(folder), shuffle=True, batch_size=64)
    return iter(DataLoader(dataset, 64, num_workers=2, collate_fn=collate))


def peer_throughput(peer: str, folder: Path, what: str, seconds: float) -> dict[str, float]:
    """Load batches of epochs of another loader; return pairs per second after the first batch."""
    clock = Clock(seconds)
    while not clock.ended:
        for batch in peer_batches(peer, folder, what):
            clock.count(len(batch) if what == "read" else len(batch[0]))
            if clock.ended:
                break
    return clock.result()


class Clock:
    """Pairs per second, and per CPU second of a process and its workers, after the first batch."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._pairs, self._begin, self._cpu = seconds, 0, 0.0, 0.0
        self.ended = False

    def count(self, pairs: int) -> None:
        if not self._begin:
            self._begin, self._cpu = time.perf_counter(), tree_seconds(os.getpid())
            return
        self._pairs += pairs
        self.ended = time.perf_counter() - self._begin > self._seconds

    def result(self) -> dict[str, float]:
        cpu = tree_seconds(os.getpid()) - self._cpu
        seconds = time.perf_counter() - self._begin
        return {"per_second": self._pairs / seconds, "per_cpu_second": self._pairs / max(cpu, 0.01)}


def tree_seconds(pid: int) -> float:
    """Return the CPU seconds of a process and its children, those that have ended included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    threads = Path(f"/proc/{pid}/task").iterdir()
    children = {child for thread in threads for child in (thread / "children").read_text().split()}
    return own + sum(tree_seconds(int(child)) for child in children)


def throughput(uri: str, what: str, seconds: float) -> dict[str, float]:
    """Load batches of an epoch; return pairs per second after the first batch."""
    from cn_clip.data.loading.loader import Loader, Preparation
    from cn_clip.data.sources.open import open_mix

    opened = time.perf_counter()
    loader = Loader(open_mix([uri]), Preparation(224), 64, workers=2, seed=1)
    opened = time.perf_counter() - opened
    clock = Clock(seconds)
    if what == "decoded":
        for epoch in range(1000):
            for batch in loader.batches(epoch):
                clock.count(len(batch.rows))
                if clock.ended:
                    return clock.result() | {"open": opened}
    else:  # in this process, as it is read there
        (source,) = loader.sources
        parts = loader.parts(0, 0)
        waiting = [next(parts) for _ in range(4)]
        for part in parts:
            waiting.append(part)
            for index in waiting.pop(0).indexes.tolist():
                source.row(index)
                source.image(index)
            clock.count(64)
            if clock.ended:
                break
    return clock.result() | {"open": opened}


def compare_remote(root: Path) -> None:
    """Compare shards on this disk and behind a server."""
    folder = root / "shards"
    folder.mkdir(parents=True)
    images = photos()
    for shard in range(40):
        write_shard(folder / f"{shard:05}.tar", shard * 500, 500, images)
    server = Path(__file__).parent.parent / "tests" / "data" / "object_server.py"
    command = [sys.executable, str(server), str(folder), "0.02"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_REGION": "x", "AWS_ACCESS_KEY_ID": "x"}
    os.environ["AWS_SECRET_ACCESS_KEY"] = "x"
    names = "{00000..00039}.tar"
    uris = {
        "local, random": f"tar:{folder}/*.tar",
        "local, stream": f"tar:{folder}/*.tar?order=stream",
        "S3": f"tar:s3://bucket/{names}",
        "HTTP": f"tar:{url}/bucket/{names}",
    }
    best: dict[tuple[str, str], dict[str, float]] = {}
    try:
        for uri in uris.values():
            measure("throughput", uri, "read", 0.1)  # builds the index
        for _round in range(2):
            for what in ("decoded", "read"):
                for name, uri in uris.items():
                    shutil.rmtree(root / "cache" / "blocks", ignore_errors=True)
                    before = sum(cpu_seconds(process.pid))
                    found = measure("throughput", uri, what, 8)
                    found["server"] = sum(cpu_seconds(process.pid)) - before
                    kept = best.setdefault((what, name), found)
                    if found["per_second"] > kept["per_second"]:
                        best[what, name] = found
    finally:
        process.kill()
    print(f"{'pairs per second':<24} {'':<10} {'pairs/s':>9} {'x local':>8} {'open, s':>8}", end="")
    print(f" {'CPU s of the server':>20}")
    for (what, name), found in best.items():
        ratio = found["per_second"] / best[what, "local, random"]["per_second"]
        print(
            f"{name:<24} {what:<10} {found['per_second']:9,.0f} {ratio:8.2f} {found['open']:8.2f}"
            f" {found['server']:20.1f}"
        )


def cpu_seconds(pid: int) -> list[float]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return [int(field) / os.sysconf("SC_CLK_TCK") for field in fields[11:13]]


def photos(side: int = 256) -> list[bytes]:
    """Return smooth noise as JPEG, of the size of photos."""
    import numpy as np
    from PIL import Image

    images = []
    for seed in range(50):
        coarse = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(
            stream, "JPEG", quality=90
        )
        images.append(stream.getvalue())
    return images


def measure(
    *arguments: object, source: str | None = None, python: str | None = None
) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if source:
        environment["PYTHONPATH"] = source
    command = [python or sys.executable, __file__, "--measure", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{arguments} failed")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def write_validation(folder: Path) -> None:
    folder.mkdir()
    rows = []
    for number, image in enumerate(tiny_images()):
        (folder / f"{number}.jpg").write_bytes(image)
        rows.append(json.dumps({"image": f"{number}.jpg", "text": f"验证{number}"}))
    (folder / "pairs.jsonl").write_text("\n".join(rows))


def compare_builds(root: Path, cache: Path, peer: str | None) -> None:
    print(f"{'index build':<24} {'us a pair':>10} {'CPU us a pair':>14} {'bytes a pair':>13}")
    for name, workers, source in (
        ("peer", 0, peer),
        ("1 process", 0, None),
        ("2 processes", 2, None),
    ):
        if name == "peer" and peer is None:
            continue
        shutil.rmtree(cache, ignore_errors=True)
        found = measure("build", root / "shards", workers, source=source)
        print(
            f"{name:<24} {found['us']:10.1f} {found['cpu_us']:14.1f} {found['bytes']:13.1f}",
            flush=True,
        )


def len_batches(folder: Path) -> int:
    return len(list(folder.glob("*.tar"))) * PER_SHARD // BATCH


def compare_sizes(root: Path) -> None:
    print(
        f"\n{'start':<24} {'pairs':>12} {'open, s':>8} {'checked':>8} {'1st batch':>9}"
        f" {'private MB':>11} {'a worker':>9}"
    )
    for folder in ("shards", "linked", "more"):
        for order in ("random", "stream"):
            for start in (0, len_batches(root / folder) // 2):
                measure("first", root / folder, order, start, 2)
                found = measure("first", root / folder, order, start, 2)
                name = f"{order}, {'resumed' if start else 'new'}"
                print(
                    f"{name:<24} {found['pairs']:12,} {found['open']:8.2f} {found['checked']:8.2f} "
                    f"{found['first']:9.2f} {found['private']:11.0f} {found['worker']:9.0f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="an empty folder with 6 GB of space")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, default=20, help="links of each shard")
    parser.add_argument("--peer", help="the src folder of another version of cn_clip")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--exactly-once", action="store_true", help="only the epochs with kills")
    parser.add_argument("--remote", action="store_true", help="only compare with an object store")
    parser.add_argument("--peers", help="only a comparison with other loaders, in this Python")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        import torch

        torch.set_num_threads(1)
        what, folder, *rest = options.measure
        if what == "build":
            print(json.dumps(build(Path(folder), int(rest[0]))))
        elif what == "first":
            print(json.dumps(first_batch(Path(folder), rest[0], int(rest[1]), int(rest[2]))))
        elif what == "mosaic":
            print(json.dumps(write_mosaic(Path(folder))))
        elif what.startswith("peer-"):
            peer = what.removeprefix("peer-")
            print(json.dumps(peer_throughput(peer, Path(folder), rest[0], float(rest[1]))))
        else:
            print(json.dumps(throughput(folder, rest[0], float(rest[1]))))
        return
    root = options.folder / "data_scale"
    cache = root / "cache"
    os.environ["CN_CLIP_CACHE"] = str(cache)
    try:
        if options.remote:
            compare_remote(root)
            return
        if options.peers:
            compare_peers(root, options.peers)
            return
        if options.exactly_once:
            exactly_once(root, options.kills)
            return
        write_shards(root / "shards", options.pairs)
        write_validation(root / "val")
        compare_builds(root, cache, options.peer)
        link_shards(root / "shards", root / "linked", options.times, unique=True)
        link_shards(root / "shards", root / "more", 10 * options.times, unique=False)
        compare_sizes(root)
        print()
        mixing()
        print()
        exactly_once(root, options.kills)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()

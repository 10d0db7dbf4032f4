"""Bulk runs: engines, growth with the number of images, a million manifests, and kills.

    python benchmarks/bulk.py engines [--photos 2000]     # against `embed` and clip-retrieval
    python benchmarks/bulk.py ray                         # Ray against the local engine
    python benchmarks/bulk.py growth [--images 200000]    # cost per image, tiny model
    python benchmarks/bulk.py simulate OUT [--shards 1000000]    # then: manifests OUT [--cold]
    python benchmarks/bulk.py kills [--workers 100] [--drivers 20]    # [OUT --seconds 60]: a piece

Each prints the ratio of what it compares, measured in turns. ``--folder`` keeps large files on
another disk. The peer of ``engines`` is clip-retrieval's reader and writer around the same model
(``pip install --no-deps clip-retrieval pandas fsspec``); ``--peer PYTHON`` also runs its whole
pipeline, with the same weights in torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from embed import make_photos
from PIL import Image

import cn_clip
from cn_clip import weights
from cn_clip.bulk.engines.base import Engine, Task
from cn_clip.bulk.engines.local import LocalEngine
from cn_clip.bulk.engines.ray import RayEngine
from cn_clip.bulk.manifest import Manifest, Written, data_names, manifest_name
from cn_clip.bulk.plan import Plan, Planned, PlannedModel, existing_plans
from cn_clip.bulk.planning import Request, make_plan
from cn_clip.bulk.run import Report, run
from cn_clip.bulk.store import open_store
from cn_clip.bulk.verify import verify
from cn_clip.config import ModelConfig, TextConfig, VisionConfig
from cn_clip.data.ray_cluster import Cluster

PEER = "clip-retrieval's reader, writer"
TEXT = TextConfig(hidden_size=64, layers=1, heads=1, intermediate_size=128)
TINY = ModelConfig("tiny", 32, VisionConfig("vit", 32, 64, (1,), 16), TEXT)
KILLED_SHARD = 200  # images of a shard of ``kills``
LOST_WITH_DRIVER = 2  # workers that end with their driver


@dataclass
class Timed:
    """When each shard ended, in seconds from the start of a run."""

    start: float = field(default_factory=time.perf_counter)
    ends: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def __call__(self, report: Report) -> None:
        if report.done > len(self.ends):
            self.ends.append(time.perf_counter() - self.start)
            self.rows.append(report.rows + report.quarantined)

    @property
    def start_up(self) -> float:
        """Seconds until the first shard ended."""
        return self.ends[0]

    @property
    def rate(self) -> float:
        """Images per second after the first shard."""
        return (self.rows[-1] - self.rows[0]) / (self.ends[-1] - self.ends[0])


def planned_model(model: str) -> PlannedModel:
    embedder = cn_clip.load(model, device="cpu")
    return PlannedModel(
        model, "auto", "cpu", "auto", False, None, embedder.name, embedder.fingerprint,
        embedder.dim, embedder.logit_scale,
    )  # fmt: skip


def plan(out: Path, model: str, source: str, shards_of: int) -> None:
    made = make_plan(
        open_store(str(out)), Request((source,), "images", "float16", shards_of,
                                      planned_model(model)), workers=2,
    )  # fmt: skip
    assert made is not None


def timed_run(out: Path, engine: Engine, retries: int = 2) -> Timed:
    timed = Timed()
    task = Task(str(out), retries=retries)
    report = run(open_store(str(out)), engine, task, on_progress=timed)
    assert not report.failures, report.failed
    return timed


def tiny_model(work: Path) -> str:
    import torch

    from cn_clip.model.clip import CLIP, initialize

    model = CLIP(TINY)
    initialize(model, torch.Generator().manual_seed(0))
    weights.save_folder(model.eval(), work / "tiny")
    return str(work / "tiny")


def tiny_images() -> list[bytes]:
    """Return 256 small images in JPEG."""
    random = np.random.default_rng(0)
    images = []
    for _each in range(256):
        stream = io.BytesIO()
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(stream, "JPEG")
        images.append(stream.getvalue())
    return images


def tiny_tars(folder: Path, count: int, per_tar: int = 10_000) -> str:
    """Write small images in tar shards: image N is N modulo 256 of ``tiny_images``."""
    images = tiny_images()
    folder.mkdir()
    for shard in range(-(-count // per_tar)):
        with tarfile.open(folder / f"{shard:05}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard * per_tar, min(count, (shard + 1) * per_tar)):
                for suffix, content in (("jpg", images[number % 256]), ("txt", b"a text")):
                    info = tarfile.TarInfo(f"{number:09}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"tar:{folder}/*.tar"


# engines


def engines(options: argparse.Namespace, work: Path) -> None:
    make_photos(_made(work / "photos"), options.photos)
    embedder = cn_clip.load(options.model, device="cpu")

    def local(workers: int) -> Callable[[], float]:
        def measure() -> float:
            out = work / f"local{workers}-{time.monotonic_ns()}"
            plan(out, options.model, str(work / "photos"), options.photos // 20)
            return timed_run(out, LocalEngine(workers)).rate

        return measure

    candidates: dict[str, Callable[[], float]] = {
        "embed": lambda: by_embed(embedder, work, options.photos),
        PEER: lambda: by_clip_retrieval(embedder, work, options.photos),
        "local, 1 worker": local(1),
        "local, 2 workers": local(2),
    }
    if options.peer:
        resolution = traced_tower(options.model, work / "tower.pt")
        candidates["clip-retrieval, torch float32"] = lambda: by_own_pipeline(
            options.peer, resolution, work, options.photos
        )
    rates = in_turns(candidates, options.rounds)
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates[PEER], strict=True)]
        print(
            f"{name:32} {statistics.median(values):8.1f} images/s, "
            f"{statistics.median(ratios):.2f} x the peer"
        )


def by_embed(embedder: Any, work: Path, count: int) -> float:
    from cn_clip.embeddings.extract import extract
    from cn_clip.embeddings.inputs import read_images

    done = extract(
        embedder, "images", read_images([str(work / "photos")]), work / "embedded", overwrite=True
    )
    return count / done.seconds


def traced_tower(model: str, path: Path) -> int:
    """Write the image tower in TorchScript; return its resolution."""
    import torch

    loaded = cn_clip.load(model, backend="torch", device="cpu", precision="float32")
    tower = loaded.backend.model.visual
    size = loaded.config.vision.resolution
    with torch.no_grad():
        torch.jit.trace(tower, torch.zeros(2, 3, size, size)).save(str(path))
    return size


def by_own_pipeline(python: str, resolution: int, work: Path, count: int) -> float:
    """Embed with clip-retrieval as it is, in an environment of its own."""
    script = Path(__file__).with_name("clip_retrieval_peer.py")
    words = [python, str(script), str(work / "tower.pt"), str(resolution), str(work / "photos")]
    words.append(str(work / f"own{time.monotonic_ns()}"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    printed = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return count / float(printed.stdout.split()[-1])


def by_clip_retrieval(embedder: Any, work: Path, count: int) -> float:
    """Embed with clip-retrieval's reader, loop and writer, and our preparation and model."""
    reader = imported("reader").FilesReader
    writer = imported("writer").NumpyWriter

    def prepare(image: Image.Image) -> Any:
        return embedder.prepare_image(image)

    out = work / f"peer{time.monotonic_ns()}"
    start = time.perf_counter()
    batches = reader(
        lambda keys: keys, prepare, None, str(work / "photos"), 256, 2, enable_text=False
    )
    sink = writer(0, str(out), False, True, False, 1)
    for batch in batches:
        vectors = embedder.embed_prepared_images(batch["image_tensor"].numpy())
        names = batch["image_filename"]
        sink({"image_embs": vectors.astype(np.float16), "image_filename": names})
    sink.flush()
    return count / (time.perf_counter() - start)


def imported(name: str) -> Any:
    """Import a module of clip-retrieval, without its server and all that it needs."""
    if "clip_retrieval" not in sys.modules:
        spec = importlib.util.find_spec("clip_retrieval")
        assert spec is not None, "pip install --no-deps clip-retrieval pandas fsspec"
        folder = next(iter(spec.submodule_search_locations or ()))
        for at in ("clip_retrieval", "clip_retrieval.clip_inference"):
            sys.modules[at] = types.ModuleType(at)
            sys.modules[at].__path__ = [str(Path(folder, *at.split(".")[1:]))]
    return importlib.import_module(f"clip_retrieval.clip_inference.{name}")


# Ray


def ray(options: argparse.Namespace, work: Path) -> None:
    make_photos(_made(work / "photos"), options.photos)

    def measure(name: str, engine: Engine) -> Callable[[], float]:
        def once() -> float:
            out = work / f"out-{time.monotonic_ns()}"
            plan(out, options.model, str(work / "photos"), options.photos // 40)
            timed = timed_run(out, engine)
            print(f"  {name}: {timed.start_up:.1f} s to the first shard")
            return timed.rate

        return once

    candidates = {
        "local": measure("local", LocalEngine(2)),
        "ray": measure("ray", RayEngine(Cluster(2))),
    }
    rates = in_turns(candidates, options.rounds)
    ratios = [a / b for a, b in zip(rates["ray"], rates["local"], strict=True)]
    print(f"ray / local after start-up: {statistics.median(ratios):.2f} ({ratios})")


# growth


def growth(options: argparse.Namespace, work: Path) -> None:
    model = tiny_model(work)
    few = options.images // 20
    sources = {count: tiny_tars(work / f"tars{count}", count) for count in (few, options.images)}
    rates: dict[int, list[float]] = {}
    for _round in range(options.rounds):
        for count, source in sources.items():
            out = work / f"out-{time.monotonic_ns()}"
            start = time.perf_counter()
            plan(out, model, source, 200)  # of few shards, the first ones distort the rate
            planned = time.perf_counter() - start
            timed = timed_run(out, LocalEngine(2))
            rates.setdefault(count, []).append(timed.rate)
            print(
                f"{count:,} images: {1e6 / timed.rate:.0f} us per image, planned in {planned:.1f} s"
            )
    cost = {count: 1e6 / statistics.median(values) for count, values in rates.items()}
    print(f"cost per image, {options.images:,} / {few:,}: {cost[options.images] / cost[few]:.3f}")


# manifests


def simulate(options: argparse.Namespace, work: Path) -> None:
    """Plan many shards, and write manifests and empty files of all but every thousandth."""
    out = Path(options.out)
    source = out.with_name("list.txt")
    (source.parent / "x.jpg").write_bytes(b"x")
    with source.open("w") as stream:
        stream.writelines(f"{number}.jpg\n" for number in range(options.shards))
    words = ["--shards-of", "1", "--device", "cpu"]
    one = work / "one.txt"
    one.write_text("x.jpg\n")
    _cpu, idle = _child(["plan", str(one), "--out", str(work / "small"), *words])
    measured("plan", ["plan", str(source), "--out", str(out), *words], idle)
    start = time.perf_counter()
    store = open_store(str(out))
    (made,) = existing_plans(store)
    planned = Planned(store, made)
    for folder in ("manifests", "img_emb", "metadata"):
        (out / folder).mkdir(exist_ok=True)
    content = _simulated(made)
    for number in made.numbers:
        if number % 1000 == 7:
            continue
        for name in data_names(number, made.embed):
            os.close(os.open(out / name, os.O_CREAT | os.O_WRONLY))
        handle = os.open(out / manifest_name(number), os.O_CREAT | os.O_WRONLY)
        own = content.replace(_NUMBER, f"{number:05}").replace("KEY", _key(planned, number))
        os.write(handle, own.replace('"SHARD"', str(number)).encode())
        os.close(handle)
    print(f"simulating took {time.perf_counter() - start:.0f} s")


_NUMBER = "87654321"  # stands for a number in names


def _key(planned: Planned, number: int) -> str:
    return f"{planned.shard(number).key:016x}"


def _simulated(made: Plan) -> str:
    """Return a manifest with placeholders."""
    names = data_names(int(_NUMBER), made.embed)
    manifest = Manifest(
        shard=0, plan=made.digest, key="KEY", rows_in=1, rows_out=1, quarantined=0,
        files={name: Written("0" * 64, 0) for name in names}, seconds=1.0, attempt=1,
        host="host", model=made.model.fingerprint,
        versions={"cn_clip": "1", "python": "3", "numpy": "2", "torch": "2"},
    )  # fmt: skip
    values = json.loads(manifest.to_json())
    return json.dumps(values | {"shard": "SHARD"})


def manifests(options: argparse.Namespace, work: Path) -> None:
    """Measure what reads the manifests of ``simulate``, each in a process of its own."""
    (work / "x.jpg").write_bytes(b"x")
    _child(["plan", str(work / "x.jpg"), "--out", str(work / "small"), "--device", "cpu"])
    _cpu, idle = _child(["status", str(work / "small")])
    (Path(options.out) / ".work" / "manifests.summary").unlink(missing_ok=True)
    for name, words in (
        ("status, first", ["status", options.out, "--json"]),
        ("status, again", ["status", options.out, "--json"]),
        ("verify", ["verify", options.out, "--json"]),
        ("driver, all done", ["run", options.out, "--part", "8/1000"]),
    ):
        if options.cold:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
        measured(name, words, idle)


def measured(name: str, words: list[str], idle: float) -> None:
    """Run a command; print its times, its peak memory, and that of the same with one shard."""
    start = time.perf_counter()
    cpu, peak = _child(words)
    seconds = time.perf_counter() - start
    print(
        f"{name}: {seconds:.1f} s, {cpu:.1f} s of CPU, peak {peak:.0f} MB ({idle:.0f} MB for one "
        "shard)",
        flush=True,
    )


def _child(words: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds of CPU, with its workers, and its own peak memory in MB."""
    command = [sys.executable, "-m", "cn_clip", "bulk", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0.0
    while True:
        pid, _code, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            return usage.ru_utime + usage.ru_stime, peak
        status = Path(f"/proc/{process.pid}/status").read_text()
        if match := re.search(r"VmHWM:\s+(\d+) kB", status):
            peak = int(match[1]) / 1e3
        time.sleep(0.05)


# kills


def kills(options: argparse.Namespace, work: Path) -> None:
    """Kill workers and drivers at random times, until the run is whole, or for some seconds."""
    work = Path(options.out) if options.out else work
    out, state = work / "out", work / "kills.json"
    if state.exists():
        killed, done = (json.loads(state.read_text())[name] for name in ("killed", "done"))
        killed = Counter(killed)
    else:
        work.mkdir(exist_ok=True)
        plan(out, tiny_model(work), tiny_tars(work / "tars", options.images), KILLED_SHARD)
        killed, done = Counter(), {}  # done: manifest -> its first inode and time
    to_kill = ["worker"] * options.workers + ["driver"] * options.drivers
    random = Random(options.seed)
    random.shuffle(to_kill)
    words = [sys.executable, __file__, "drive", str(out), "--engine", options.engine]
    driver = subprocess.Popen(words)
    start = time.monotonic()
    while (code := driver.poll()) != 0:
        assert code is None, f"the driver ended with {code}"
        if options.seconds and time.monotonic() - start > options.seconds:
            driver.terminate()
            driver.wait()
            killed["stopped"] += 1
            break
        time.sleep(0.01)
        done = _manifests(out) | done
        share = len(done) / (options.images / KILLED_SHARD)
        busy = _workers_at_work(out, driver.pid)
        begun = killed["worker"] + killed["driver"]
        # As fast as shards end, a little ahead of them.
        if not busy or begun == len(to_kill) or begun > (share + 0.1) * len(to_kill):
            continue
        time.sleep(random.uniform(0, 0.1))
        if to_kill[begun] == "driver":
            driver.kill()
            driver.wait()
            killed["driver"] += 1
            driver = subprocess.Popen(words)
        else:
            killed["worker"] += _kill(random.choice(busy))
    killed["seconds"] += round(time.monotonic() - start)
    written_again = sum(_manifests(out).get(name) != tuple(first) for name, first in done.items())
    print(f"{dict(killed)}, {len(done)} shards done, {written_again} manifests written again")
    state.write_text(json.dumps({"killed": killed, "done": done}))
    if driver.returncode == 0:
        _report_kills(out, str(work / "tiny"), killed, options.images)


def _manifests(out: Path) -> dict[str, tuple[int, int]]:
    """Return the inode and time of each manifest."""
    states = {each.name: each.stat() for each in (out / "manifests").glob("*.json")}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in states.items()}


def _workers_at_work(out: Path, driver: int) -> list[int]:
    """Return the process ids of the workers of a driver that compute a shard."""
    pids = []
    for note in (out / ".work" / "notes").glob("*.json"):
        with suppress(OSError, ValueError):  # it ended meanwhile
            pids.append(int(json.loads(note.read_text())["pid"]))
    return [pid for pid in pids if driver in _ancestors(pid)]


def _ancestors(pid: int) -> list[int]:
    """Return the parent of a process, its parent, and so on; none if it has ended."""
    found: list[int] = []
    with suppress(OSError):
        while pid > 1:
            status = Path(f"/proc/{pid}/stat").read_text()
            pid = int(status.rpartition(")")[2].split()[1])
            found.append(pid)
    return found


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:  # it ended meanwhile
        return False
    return True


def _report_kills(out: Path, model: str, killed: Counter[str], images: int) -> None:
    """Print what is missing, twice, wrong or was begun again, by the inputs themselves."""
    from pyarrow import parquet

    found = verify(open_store(str(out)), checksums=True)
    right = cn_clip.load(model, device="cpu").embed_images(
        [Image.open(io.BytesIO(content)) for content in tiny_images()]
    )
    rows: Counter[int] = Counter()
    wrong = 0
    for path in (out / "metadata").glob("*.parquet"):
        ids = parquet.read_table(path, columns=["image_id"])["image_id"].to_pylist()
        numbers = np.array(ids, np.int64)
        vectors = np.load(out / "img_emb" / f"img_emb_{path.stem.rpartition('_')[2]}.npy")
        rows.update(numbers.tolist())
        expected = right[numbers % len(right)]
        wrong += int(((vectors.astype(np.float32) * expected).sum(axis=1) < 0.999).sum())
    manifests = [json.loads(path.read_text()) for path in (out / "manifests").glob("*.json")]
    print(
        f"{killed['worker']} workers and {killed['driver']} drivers killed: "
        f"{len(set(range(images)) - rows.keys())} missing, "
        f"{sum(count > 1 for count in rows.values())} twice, {wrong} with a wrong vector, "
        f"complete: {found.complete}, orphans: {len(found.orphans)}; "
        f"{sum(each['attempt'] - 1 for each in manifests)} shards begun again, of "
        f"{killed['worker'] + LOST_WITH_DRIVER * (killed['driver'] + killed['stopped'])} workers "
        f"that ended"
    )


def drive(options: argparse.Namespace, work: Path) -> None:
    """Run a plan, in the process that ``kills`` kills."""
    engine: Engine = LocalEngine(2) if options.engine == "local" else RayEngine(Cluster(2))
    report = run(open_store(options.out), engine, Task(options.out, retries=1000))
    assert not report.failures, report.failed


# all


def in_turns(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for _round in range(rounds):
        for name, measure in candidates.items():
            rates[name].append(measure())
            print(f"  {name}: {rates[name][-1]:.1f} images/s", flush=True)
    return rates


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ("engines", "ray", "growth", "simulate", "manifests", "kills", "drive")
    parser.add_argument("what", choices=names)
    parser.add_argument("out", nargs="?")
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--images", type=int)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--drivers", type=int, default=20)
    parser.add_argument("--engine", choices=("local", "ray"), default="ray")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--peer", help="Python of an environment with clip-retrieval")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="of kills OUT, which goes on in OUT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder")
    parser.add_argument("--cold", action="store_true", help="empty the disk cache, as root")
    options = parser.parse_args()
    options.images = options.images or {"growth": 200_000, "kills": 20_000}.get(options.what, 0)
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        globals()[options.what](options, Path(work))
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"peak memory of this process: {own:.0f} MB")


if __name__ == "__main__":
    main()

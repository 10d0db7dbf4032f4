"""Speed of this machine: preparation, both towers in every backend, and search."""

from __future__ import annotations

import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

from cn_clip import __version__
from cn_clip.backends.exported import cached_export, is_export, read_exported
from cn_clip.backends.pipeline import ImagePreparation
from cn_clip.bench.floor import NOISE, Floor, measure_floors
from cn_clip.bench.operations import image_operations, text_operations
from cn_clip.bench.worker import Loaded, Round, Setting, serve_rounds
from cn_clip.config import ModelConfig
from cn_clip.embedder import load, locate
from cn_clip.errors import CNClipError
from cn_clip.image.decode import read_image
from cn_clip.processes import cpu_info, usable_cpus
from cn_clip.sample import embedded_sample
from cn_clip.tokenizer import Tokenizer, default_tokenizer
from cn_clip.topk import top_k
from cn_clip.translation import N_, _

_ROUNDS = 5
_GALLERY, _SECONDS = 100_000, 0.5  # of the stages
_LARGE = (4000, 3000)  # a 12-megapixel photo
_ARITHMETIC = {"float16": "float32", "int8+bfloat16": "int8"}  # what the products run in


@dataclass(frozen=True, slots=True)
class Stage:
    """Rate of one stage that no backend runs, items per second."""

    name: str
    per_second: float


@dataclass(frozen=True, slots=True)
class BackendSpeed:
    """One backend in one precision. Latency is of one item, memory of the whole process.

    Attributes:
        backend: the runtime.
        precision: that it runs in.
        load_seconds: to load the model, imports included.
        images_per_s: median rate of batches.
        texts_per_s: median rate of the sample's texts.
        image_ms: median and 95th percentile for one prepared image.
        text_ms: median and 95th percentile for one text, tokenizing included.
        peak_mb: peak resident memory, 10^6 bytes.
        image_share: share of the arithmetic floor, None without one.
        text_share: share of the arithmetic floor, None without one.
    """

    backend: str
    precision: str
    load_seconds: float
    images_per_s: float
    texts_per_s: float
    image_ms: tuple[float, float]
    text_ms: tuple[float, float]
    peak_mb: float
    image_share: float | None
    text_share: float | None


@dataclass(frozen=True, slots=True)
class BenchResult:
    """A machine and what it reaches; ``skipped`` has a reason per backend that did not run."""

    version: str
    model: str
    processor: str
    cpus: int
    batch_size: int
    floors: list[Floor]
    stages: list[Stage]
    backends: list[BackendSpeed]
    skipped: dict[str, str]

    @property
    def is_noisy(self) -> bool:
        """Whether other programs disturbed the measurement."""
        return any(floor.spread > NOISE for floor in self.floors)


def bench(
    model: str | os.PathLike[str] = "mini",
    *,
    batch_size: int = 8,
    rounds: int = _ROUNDS,
    tick: Callable[[], object] = lambda: None,
) -> BenchResult:
    """Measure every backend that can run a model here: torch, and its cached exports.

    Backends run in processes of their own, a round each in turn, so that a change of the machine's
    speed meets all of them.

    Args:
        model: a name or checkpoint, or an export.
        batch_size: images per batch.
        rounds: measurements of each backend.
        tick: called after each round.

    Raises:
        CNClipError: the model cannot be loaded, or no backend runs it.
    """
    path = locate(model)
    settings = _settings(os.fspath(model), path, batch_size)
    config = read_exported(path).model if is_export(path) else load(model).config
    floors = measure_floors(config)
    loaded, results, skipped = _measure(settings, rounds, tick)
    if not results:
        raise CNClipError(
            _(
                "no backend can run {model}: {skipped}",
                model=model,
                skipped="; ".join(skipped.values()),
            )
        )
    return BenchResult(
        version=__version__,
        model=config.name,
        processor=processor_name(),
        cpus=usable_cpus(),
        batch_size=batch_size,
        floors=floors,
        stages=_stages(ImagePreparation(config), default_tokenizer(), config.embed_dim),
        backends=[
            _summary(setting, loaded[setting], results[setting], config, floors)
            for setting in results
        ],
        skipped=skipped,
    )


def processor_name() -> str:
    """Return the CPU's name."""
    for line in cpu_info("model name"):
        return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _settings(model: str, path: Path, batch_size: int) -> list[Setting]:
    """Return the ways to run a model: in torch, and in both runtimes for its exports."""
    exports: list[str] = []
    settings: list[Setting] = []
    if is_export(path):
        exports = [model]
    else:
        settings += [
            Setting(model, "torch", "float32", batch_size),
            Setting(model, "torch", "bfloat16", batch_size),
        ]
        candidates = [
            cached_export(path, runtime, precision)
            for runtime in ("onnx", "openvino")
            for precision in ("float32", "float16", "int8")
        ]
        exports = [str(folder) for folder in candidates if is_export(folder)]
    for folder in exports:
        if read_exported(Path(folder)).runtime == "onnx":
            settings.append(Setting(folder, "onnx", "auto", batch_size))
        settings += [
            Setting(folder, "openvino", "auto", batch_size),
            Setting(folder, "openvino", "bfloat16", batch_size),
        ]
    return settings


def _measure(
    settings: Sequence[Setting], rounds: int, tick: Callable[[], object]
) -> tuple[dict[Setting, Loaded], dict[Setting, list[Round]], dict[str, str]]:
    """Return what each setting loaded, its rounds, and why a setting did not run."""
    context = multiprocessing.get_context("spawn")
    loaded: dict[Setting, Loaded] = {}
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        connections: dict[Setting, Connection] = {}
        for setting in settings:  # one at a time: loading is measured too
            connection, theirs = context.Pipe()
            worker = context.Process(target=serve_rounds, args=(setting, theirs), daemon=True)
            worker.start()
            theirs.close()
            stack.callback(worker.join)
            stack.callback(worker.terminate)
            answer = _receive(connection)
            if isinstance(answer, Loaded):
                loaded[setting], connections[setting] = answer, connection
            else:
                skipped[_title(setting)] = str(answer)
        results: dict[Setting, list[Round]] = {setting: [] for setting in connections}
        for _unused in range(rounds):
            for setting in list(results):
                answer = _receive(connections[setting], send=True)
                if isinstance(answer, Round):
                    results[setting].append(answer)
                else:  # the others go on
                    skipped[_title(setting)] = str(answer)
                    del results[setting]
            tick()
    return loaded, results, skipped


def _receive(connection: Connection, *, send: bool = False) -> object:
    """Receive what a worker sends, for ``send`` after a request; or why there is none."""
    try:
        if send:
            connection.send(True)
        return connection.recv()
    except (EOFError, OSError):
        return _("its process ended; is there enough memory?")


def _title(setting: Setting) -> str:
    return f"{setting.backend} {setting.precision} ({Path(setting.model).name})"


def _summary(
    setting: Setting,
    loaded: Loaded,
    rounds: Sequence[Round],
    config: ModelConfig,
    floors: Sequence[Floor],
) -> BackendSpeed:
    arithmetic = _ARITHMETIC.get(loaded.precision, loaded.precision)
    floor = next((1e9 * f.gflops for f in floors if f.precision == arithmetic), None)
    images = float(np.median([r.images_per_s for r in rounds]))
    texts = float(np.median([r.texts_per_s for r in rounds]))
    per_image = image_operations(config)
    return BackendSpeed(
        backend=setting.backend,
        precision=loaded.precision,
        load_seconds=loaded.seconds,
        images_per_s=images,
        texts_per_s=texts,
        image_ms=_percentiles([s for r in rounds for s in r.image_seconds]),
        text_ms=_percentiles([s for r in rounds for s in r.text_seconds]),
        peak_mb=max(r.peak_memory for r in rounds) / 1e6,
        image_share=images * per_image / floor if floor and per_image else None,
        text_share=texts * text_operations(config, loaded.tokens) / floor if floor else None,
    )


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 95th percentile in milliseconds."""
    median, high = np.percentile(seconds, [50, 95])
    return float(median) * 1000, float(high) * 1000


def _stages(prepare: ImagePreparation, tokenizer: Tokenizer, dim: int) -> list[Stage]:
    sample = embedded_sample()
    texts = sample.texts * 16
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((_GALLERY, dim), dtype=np.float32)
    with tempfile.TemporaryDirectory(prefix="cn_clip-") as folder:
        large = Path(folder) / "large.jpg"
        Image.open(sample.images[0]).resize(_LARGE).save(large, quality=92)
        fast = replace(prepare, fast_decode=True)
        return [
            Stage(N_("decode, 12 megapixels"), _per_second(lambda: read_image(large))),
            Stage(N_("prepare, 12 megapixels"), _per_second(lambda: prepare(large))),
            Stage(N_("prepare, 12 megapixels, fast_decode"), _per_second(lambda: fast(large))),
            Stage(
                N_("prepare, 256 pixels"),
                len(sample.images) * _per_second(lambda: [prepare(path) for path in sample.images]),
            ),
            Stage(N_("tokenize"), len(texts) * _per_second(lambda: tokenizer.encode(texts))),
            Stage(
                N_("top 10 of 100,000, one query"),
                _per_second(lambda: top_k(gallery[:1], gallery, 10)),
            ),
        ]


def _per_second(run: Callable[[], object]) -> float:
    """Return calls per second: the best of several."""
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return 1 / best

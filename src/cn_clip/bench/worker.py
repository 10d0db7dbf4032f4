"""One backend measured in a process of its own, so that its peak memory is its own too."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from cn_clip.config import BackendName, Precision
from cn_clip.embedder import Embedder, load
from cn_clip.processes import end_with_parent
from cn_clip.sample import embedded_sample

_TEXTS_REPEATED = 4  # of the sample
_LATENCY_CALLS = 5  # per round


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to run a model: arguments of ``cn_clip.load``."""

    model: str
    backend: BackendName
    precision: Precision
    batch_size: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A worker that is ready: what was loaded, and in how many seconds."""

    precision: str
    seconds: float
    tokens: float
    """Mean length of a text of the sample."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round of measurements; memory in bytes."""

    images_per_s: float
    texts_per_s: float
    image_seconds: list[float]
    text_seconds: list[float]
    peak_memory: int


def serve_rounds(setting: Setting, connection: Connection) -> None:
    """Load a model, then run a round for each message until one is None.

    Sends ``Loaded`` and then a ``Round`` per message, or the text of an error.
    """
    end_with_parent()
    try:
        start = time.perf_counter()
        embedder = load(
            setting.model, backend=setting.backend, device="cpu", precision=setting.precision
        )
        seconds = time.perf_counter() - start
        run = _round(embedder, setting.batch_size)
        lengths = [len(ids) for ids in embedder.prepare_texts(embedded_sample().texts)]
        connection.send(Loaded(embedder.backend.precision, seconds, float(np.mean(lengths))))
        while connection.recv() is not None:
            connection.send(run())
    except Exception as error:  # of a runtime, of any type: the parent reports it
        with suppress(OSError):  # the parent is gone
            connection.send(str(error) or type(error).__name__)


def _round(embedder: Embedder, batch_size: int) -> Callable[[], Round]:
    sample = embedded_sample()
    texts = sample.texts * _TEXTS_REPEATED
    ids = embedder.prepare_texts(texts)
    prepared = [embedder.prepare_image(path) for path in sample.images]
    batch = (prepared * (batch_size // len(prepared) + 1))[:batch_size]

    def run() -> Round:
        image_seconds = [
            _seconds(lambda: embedder.embed_prepared_images(prepared[:1]))
            for _ in range(_LATENCY_CALLS)
        ]
        text_seconds = [
            _seconds(lambda text=text: embedder.embed_texts(text))  # type: ignore[misc]
            for text in texts[:_LATENCY_CALLS]
        ]
        return Round(
            images_per_s=len(batch) / _seconds(lambda: embedder.embed_prepared_images(batch)),
            texts_per_s=len(ids) / _seconds(lambda: embedder.embed_prepared_texts(ids)),
            image_seconds=image_seconds,
            text_seconds=text_seconds,
            peak_memory=peak_memory(),
        )

    run()  # the first calls allocate and compile
    return run


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes; 0 where it is unknown."""
    # On Linux, getrusage() counts the memory of the parent at the time of the fork too.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start

"""The self-test of a backend: its embeddings of the golden images and texts are as expected.

Graphs that are right on one machine can be wrong on another: int8 arithmetic saturates on CPUs
without VNNI (onnxruntime#14642) and was wrong on AMX (onnxruntime#26324).
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np

from cn_clip import __version__
from cn_clip.backends import Backend, Features
from cn_clip.backends.exported import (
    CONFIG,
    Deviation,
    Exported,
    check_hashes,
    hash_file,
    read_golden,
)
from cn_clip.backends.graph import GraphBackend
from cn_clip.backends.pipeline import unit_length
from cn_clip.cache import keep_record, record_path
from cn_clip.errors import CheckpointError
from cn_clip.processes import cpu_info
from cn_clip.translation import _

# Largest 1 - cosine to the float32 original that rounding in a precision explains.
ALLOWED = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-3}
_MAX_ALLOWED = 0.2  # whatever an export says of itself


def self_test(folder: Path, exported: Exported, backend: GraphBackend) -> None:
    """Check the hashes of an export and a backend's golden embeddings.

    It runs once per machine, runtime version, precision and content of the folder; the result is
    kept in the cache folder if that is writable.

    Args:
        folder: the export.
        exported: its config.
        backend: to be tested.

    Raises:
        CheckpointError: a file changed, or the embeddings differ; the message has the cosines.
    """
    passed = _result_file(folder, exported, backend)
    if passed is not None and os.path.isfile(passed):
        return
    check_hashes(folder, exported)
    measured = golden_deviation(folder, exported, backend)
    allowed = allowed_deviation(exported, backend.precision)
    for tower in ("image", "text"):
        value, limit = getattr(measured, tower), getattr(allowed, tower)
        if not value <= limit:
            raise CheckpointError(
                _(
                    "{folder} gives wrong {tower} embeddings with {runtime} in {precision} on "
                    "this machine: cosine {value:.6f} to the expected ones, {limit:.6f} is "
                    "required; use another backend or precision",
                    folder=folder,
                    tower=tower,
                    runtime=backend.runtime,
                    precision=backend.precision,
                    value=1 - value,
                    limit=1 - limit,
                )
            )
    keep_record(passed, {"image": measured.image, "text": measured.text})


def golden_deviation(folder: Path, exported: Exported, backend: Backend) -> Deviation:
    """Return the largest 1 - cosine of a backend's golden images and texts."""
    golden = read_golden(folder, exported)
    images = backend.run_images(golden.pixels)
    texts = backend.run_texts(golden.ids, golden.ids != 0)
    return Deviation(
        image=_deviation(images, golden.image_embeddings),
        text=_deviation(texts, golden.text_embeddings),
    )


def allowed_deviation(exported: Exported, precision: str) -> Deviation:
    """Return the deviation at which a backend is refused.

    It is that of rounding, or for int8 twice the deviation measured when it was exported.
    """
    floats = [ALLOWED[part] for part in precision.split("+") if part in ALLOWED]
    rounding = max(floats, default=ALLOWED["float32"])
    if exported.precision != "int8":
        return Deviation(rounding, rounding)
    measured = exported.deviation
    return Deviation(
        image=min(_MAX_ALLOWED, rounding + 2 * measured.image),
        text=min(_MAX_ALLOWED, rounding + 2 * measured.text),
    )


def _deviation(features: Features, expected: Features) -> float:
    cosines = np.einsum("nd,nd->n", unit_length(features).astype(np.float64), expected)
    if not np.isfinite(cosines).all():
        return float("inf")
    return max(0.0, float(1 - cosines.min()))


def _result_file(folder: Path, exported: Exported, backend: GraphBackend) -> Path | None:
    """Return the file that exists once the test has passed; None without a cache folder."""
    files = [(name, (folder / name).stat().st_mtime_ns) for name in sorted(exported.files)]
    config = hash_file(folder / CONFIG).sha256
    key = [os.path.realpath(folder), files, config, backend.precision, backend.runtime]
    key += [__version__, platform.node(), platform.machine(), platform.processor()]
    key += cpu_info("model name", "flags", "Features")
    return record_path("self-test", key)

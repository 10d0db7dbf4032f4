"""Which runtime runs an export: the fastest of those installed, measured once per machine."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from cn_clip.backends.exported import Exported, Runtime
from cn_clip.backends.graph import GraphBackend
from cn_clip.backends.self_test import self_test
from cn_clip.cache import keep_record, record_path
from cn_clip.errors import CNClipError, UsageError
from cn_clip.outputs import json_object_at
from cn_clip.processes import usable_cpus
from cn_clip.translation import _

_PACKAGES: dict[Runtime, str] = {"onnx": "onnxruntime", "openvino": "openvino"}
_IMAGES, _REPEATS = 4, 3  # of the measurement


class _Module(Protocol):
    def open_backend(
        self, folder: Path, exported: Exported, *, device: str, precision: str
    ) -> GraphBackend: ...


def open_export(
    folder: Path,
    exported: Exported,
    runtime: str,
    *,
    device: str = "auto",
    precision: str = "auto",
    test: bool = True,
) -> GraphBackend:
    """Open an export in a runtime and test it.

    Args:
        folder: the export.
        exported: its config.
        runtime: ``"onnx"``, ``"openvino"`` or ``"auto"``.
        device: a device of the runtime.
        precision: a precision of the runtime.
        test: whether to run the self-test.

    Raises:
        UsageError: no runtime is installed, or the device or precision is not available.
        CheckpointError: a graph is damaged or gives wrong embeddings.
    """
    if runtime != "auto":
        return _open(folder, exported, cast(Runtime, runtime), device, precision, test)
    runtimes: list[Runtime] = [exported.runtime]
    if exported.runtime == "onnx":  # both read ONNX graphs
        runtimes.append("openvino")
    installed = [name for name in runtimes if _location(name)]
    if len(installed) < 2:
        return _open(folder, exported, (installed or runtimes)[0], device, precision, test)
    return _fastest(folder, exported, installed, device, precision, test)


def _location(runtime: Runtime) -> str | None:
    """Return the file of a runtime's package, None if it is not installed."""
    spec = importlib.util.find_spec(_PACKAGES[runtime])
    return spec.origin if spec is not None else None  # a folder of that name has none


def _open(
    folder: Path,
    exported: Exported,
    runtime: Runtime,
    device: str,
    precision: str,
    test: bool,
) -> GraphBackend:
    package = _PACKAGES[runtime]
    if _location(runtime) is None:
        raise UsageError(
            _(
                'backend "{runtime}" needs {package}, which is not installed: pip install '
                "{package}",
                runtime=runtime,
                package=package,
            )
        )
    try:
        module = cast(_Module, importlib.import_module(f"cn_clip.backends.{runtime}"))
    except (ImportError, AttributeError, OSError) as error:
        raise UsageError(
            _(
                "{package} is installed but cannot be imported ({error}); install it again",
                package=package,
                error=error,
            )
        ) from None
    backend = module.open_backend(folder, exported, device=device, precision=precision)
    if test:
        self_test(folder, exported, backend)
    return backend


def _fastest(
    folder: Path,
    exported: Exported,
    installed: list[Runtime],
    device: str,
    precision: str,
    test: bool,
) -> GraphBackend:
    """Open the runtime that embeds images fastest; the measurement is kept in the cache folder."""
    record = _record_file(exported, installed, device, precision)
    known = json_object_at(record).get("fastest") if record else None
    if known in installed:
        with suppress(CNClipError):  # measured again: it worked before
            return _open(folder, exported, cast(Runtime, known), device, precision, test)
    backends: dict[Runtime, GraphBackend] = {}
    errors: list[CNClipError] = []
    for name in installed:
        try:
            backends[name] = _open(folder, exported, name, device, precision, test)
        except CNClipError as error:  # another one may work
            errors.append(error)
    if not backends:
        raise errors[0]
    seconds = _measure(backends, exported)
    fastest = min(seconds, key=lambda name: seconds[name])
    keep_record(record, {"fastest": fastest, "seconds": seconds})
    return backends[fastest]


def _measure(backends: dict[Runtime, GraphBackend], exported: Exported) -> dict[Runtime, float]:
    """Return the least seconds for a batch of images, interleaved."""
    size = exported.model.vision.resolution
    pixels = np.zeros((_IMAGES, 3, size, size), np.float32)
    seconds = dict.fromkeys(backends, float("inf"))
    for _unused in range(_REPEATS + 1):
        for name, backend in backends.items():
            start = time.perf_counter()
            backend.run_images(pixels)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def _record_file(
    exported: Exported, installed: list[Runtime], device: str, precision: str
) -> Path | None:
    packages = [(name, os.stat(_location(name) or "").st_mtime_ns) for name in installed]
    key = [exported.fingerprint, packages, device, precision, platform.node(), usable_cpus()]
    return record_path("fastest", key)

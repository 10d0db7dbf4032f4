"""The OpenVINO backend, for ONNX exports and for exports in OpenVINO's own format."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from cn_clip.backends import Features
from cn_clip.backends.exported import Exported, Graph
from cn_clip.backends.graph import GraphBackend, RunGraph
from cn_clip.errors import CheckpointError, UsageError
from cn_clip.processes import usable_cpus
from cn_clip.translation import _

_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_CAPABILITIES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}


def open_backend(
    folder: Path, exported: Exported, *, device: str = "auto", precision: str = "auto"
) -> GraphBackend:
    """Open an export in OpenVINO.

    Args:
        folder: the export.
        exported: its config.
        device: ``"cpu"``, ``"gpu"`` (Intel), ``"npu"``, or ``"auto"``: the CPU.
        precision: of the arithmetic that is not quantised: ``"float32"``, or ``"bfloat16"`` or
            ``"float16"`` where the device has it. ``"auto"`` is float32.

    Raises:
        UsageError: the device or precision is not available.
        CheckpointError: a graph cannot be loaded.
    """
    core = ov.Core()
    target = "CPU" if device in ("auto", "cpu") else device.upper()
    if target not in core.available_devices:
        known = ", ".join(name.lower() for name in core.available_devices)
        raise UsageError(
            _(
                "device {device!r} is not available: OpenVINO {version} has {known} here",
                device=device,
                version=ov.__version__,
                known=known,
            )
        )
    arithmetic = "float32" if precision in ("auto", exported.precision) else precision
    if exported.precision == "int8":
        arithmetic = arithmetic.removeprefix("int8+")
    capabilities = core.get_property(target, "OPTIMIZATION_CAPABILITIES")
    if _CAPABILITIES.get(arithmetic) not in capabilities:
        known = ", ".join(name for name, c in _CAPABILITIES.items() if c in capabilities)
        raise UsageError(
            _(
                "precision {precision!r} is not available on this {target}; it has {known}",
                precision=precision,
                target=target,
                known=known,
            )
        )
    options = {
        "INFERENCE_PRECISION_HINT": _HINTS[arithmetic],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": usable_cpus(),
    }
    options = options if target == "CPU" else {"INFERENCE_PRECISION_HINT": _HINTS[arithmetic]}
    name = exported.precision if arithmetic == "float32" else arithmetic
    if exported.precision == "int8" and arithmetic != "float32":
        name = f"int8+{arithmetic}"
    return GraphBackend(
        exported,
        _open(core, target, options, folder, exported.image),
        _open(core, target, options, folder, exported.text),
        precision=name,
        runtime=f"openvino {ov.__version__} {core.get_property(target, 'FULL_DEVICE_NAME')}",
    )


def _open(
    core: ov.Core, device: str, options: dict[str, Any], folder: Path, graph: Graph
) -> RunGraph:
    path = folder / graph.file
    try:
        model = core.read_model(path)
        compiled = core.compile_model(model, device, options)
        output = compiled.output(graph.output)
        compiled.input(graph.input)
    except RuntimeError as error:
        raise CheckpointError(
            _(
                "OpenVINO {version} cannot load {path}: {error}; export the model again",
                version=ov.__version__,
                path=path,
                error=error,
            )
        ) from None
    requests = threading.local()  # a request runs one batch at a time

    def run(batch: npt.NDArray[Any]) -> Features:
        if not hasattr(requests, "request"):
            requests.request = compiled.create_infer_request()
        result = requests.request.infer({graph.input: batch})[output]
        return np.array(result, np.float32)  # a copy: the request reuses its memory

    return run

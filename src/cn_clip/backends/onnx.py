"""The ONNX Runtime backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from cn_clip.backends import Features
from cn_clip.backends.exported import Exported, Graph
from cn_clip.backends.graph import GraphBackend, RunGraph
from cn_clip.errors import CheckpointError, UsageError
from cn_clip.processes import usable_cpus
from cn_clip.translation import _

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
}


def open_backend(
    folder: Path, exported: Exported, *, device: str = "auto", precision: str = "auto"
) -> GraphBackend:
    """Open an ONNX export in ONNX Runtime.

    Args:
        folder: the export.
        exported: its config.
        device: a key of ``PROVIDERS``, ``"cuda:1"``, or ``"auto"``: CUDA if present, else the CPU.
        precision: ``"auto"`` or the precision of the export. ONNX Runtime computes in the
            precision of the graph.

    Raises:
        UsageError: the device or precision is not available.
        CheckpointError: a graph cannot be loaded.
    """
    if exported.runtime != "onnx":
        raise UsageError(
            _(
                '{folder} has no ONNX graphs; load it with backend="{runtime}"',
                folder=folder,
                runtime=exported.runtime,
            )
        )
    if precision not in ("auto", exported.precision):
        raise UsageError(
            _(
                "ONNX Runtime runs {folder} in {precision}, not {wanted}; give precision "
                '"auto", export the model in {wanted}, or use backend="openvino"',
                folder=folder,
                precision=exported.precision,
                wanted=precision,
            )
        )
    providers = _providers(device)
    image, text = (
        _open(folder / graph.file, providers, must=device != "auto")
        for graph in (exported.image, exported.text)
    )
    return GraphBackend(
        exported,
        _runner(image, folder, exported.image),
        _runner(text, folder, exported.text),
        precision=exported.precision,
        runtime=f"onnxruntime {ort.__version__} {image.get_providers()} {providers[0]}",
    )


def _providers(device: str) -> list[Any]:
    available = ort.get_available_providers()
    if device == "auto":
        device = "cuda" if PROVIDERS["cuda"] in available else "cpu"
    kind, _unused, index = device.partition(":")
    provider = PROVIDERS.get(kind)
    if provider not in available or (index and not index.isdecimal()):
        known = [name for name, provider in PROVIDERS.items() if provider in available]
        raise UsageError(
            _(
                "device {device!r} is not available: this onnxruntime {version} has {known}; "
                "other devices need another build, such as onnxruntime-gpu",
                device=device,
                version=ort.__version__,
                known=", ".join(known),
            )
        )
    options = {"device_id": int(index)} if index else {}
    return [(provider, options), *([] if kind == "cpu" else [PROVIDERS["cpu"]])]


def _open(path: Path, providers: list[Any], *, must: bool) -> ort.InferenceSession:
    """Open a graph; without ``must``, the CPU runs it if the first provider cannot start."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    options.enable_mem_pattern = False  # it keeps a memory plan for every input shape
    options.log_severity_level = 3  # errors only
    try:
        session = ort.InferenceSession(path, options, providers=providers)
    except Exception as error:  # the C++ library raises many types
        raise CheckpointError(
            _(
                "ONNX Runtime {version} cannot load {path}: {error}; export the model again",
                version=ort.__version__,
                path=path,
                error=error,
            )
        ) from None
    provider = providers[0][0]
    if must and provider not in session.get_providers():  # it falls back with a log line only
        raise UsageError(
            _(
                "ONNX Runtime could not start {provider}; install its libraries (CUDA, cuDNN), or "
                'use device="cpu"',
                provider=provider,
            )
        )
    return session


def _runner(session: ort.InferenceSession, folder: Path, graph: Graph) -> RunGraph:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if [i.name for i in inputs] != [graph.input] or [o.name for o in outputs] != [graph.output]:
        raise CheckpointError(
            _(
                "{path} is another graph than the export's config describes",
                path=folder / graph.file,
            )
        )

    def run(batch: npt.NDArray[Any]) -> Features:
        features: npt.NDArray[Any] = session.run([graph.output], {graph.input: batch})[0]
        return features.astype(np.float32, copy=False)

    return run

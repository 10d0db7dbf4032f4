"""The arithmetic floor of a machine: plain matrix products of a model's sizes."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cn_clip.config import ModelConfig
from cn_clip.processes import usable_cpus

_RUNS, _SECONDS = 3, 0.4  # of each precision
_ROWS = 1576  # tokens of 8 images of ViT-B/16
NOISE = 0.05  # largest spread of the runs on a quiet machine


@dataclass(frozen=True, slots=True)
class Floor:
    """Arithmetic rate of matrix products in one precision.

    Attributes:
        precision: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        gflops: 10^9 additions and multiplications per second, the best of all runs.
        spread: (best - worst) / best over the runs.
    """

    precision: str
    gflops: float
    spread: float


def measure_floors(config: ModelConfig) -> list[Floor]:
    """Measure products (1576, W) x (W, 4 W), with W the width of the wider tower."""
    width = max(config.vision.width, config.text.hidden_size)
    products = {
        "float32": _torch_product(width, "float32"),
        "bfloat16": _torch_product(width, "bfloat16"),
        "int8": _int8_product(width),
    }
    operations = 2 * _ROWS * width * 4 * width
    seconds: dict[str, list[float]] = {name: [] for name, run in products.items() if run}
    for _ in range(_RUNS):  # interleaved
        for name, run in products.items():
            if run is not None:
                seconds[name].append(_best_seconds(run))
    return [
        Floor(name, operations / min(times) / 1e9, 1 - min(times) / max(times))
        for name, times in seconds.items()
    ]


def _best_seconds(run: Callable[[], object]) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while (start := time.perf_counter()) < end:
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _torch_product(width: int, precision: str) -> Callable[[], object]:
    import torch

    dtype = getattr(torch, precision)
    a = torch.randn(_ROWS, width).to(dtype)
    b = torch.randn(4 * width, width).to(dtype).t()
    return lambda: a @ b


def _int8_product(width: int) -> Callable[[], object] | None:
    """Return a product by ONNX Runtime's MatMulInteger; None if it is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        return None
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    b = rng.integers(-127, 128, (width, 4 * width), dtype=np.int8)
    a = rng.integers(0, 255, (_ROWS, width), dtype=np.uint8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [_ROWS, width])],
        [helper.make_tensor_value_info("c", TensorProto.INT32, [_ROWS, 4 * width])],
        [numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return lambda: session.run(None, {"a": a})

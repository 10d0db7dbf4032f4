"""Weights stored in float16: half the size, computed with in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_SMALLEST = 1024  # values; smaller tensors, such as biases, keep their precision


def to_float16(path: Path) -> None:
    """Store the large float32 weights of an ONNX graph in float16, in place.

    A ``Cast`` turns each back into float32; runtimes do this once, when they load the graph.
    """
    model = onnx.load(path)
    graph = model.graph
    casts = []
    for weight in graph.initializer:
        if weight.data_type != TensorProto.FLOAT or np.prod(weight.dims) < _SMALLEST:
            continue
        name = weight.name
        half = numpy_helper.from_array(
            numpy_helper.to_array(weight).astype(np.float16), f"{name}.float16"
        )
        weight.CopyFrom(half)
        casts.append(helper.make_node("Cast", [half.name], [name], to=TensorProto.FLOAT))
    for node in reversed(casts):
        graph.node.insert(0, node)
    save_in_place(model, path)


def save_in_place(model: onnx.ModelProto, path: Path) -> None:
    """Save a graph and one file of weights over those it was loaded from."""
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces of the exporter, a third of a small graph
        node.doc_string = ""
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=_SMALLEST)
    data.chmod(path.stat().st_mode)  # onnx lets only the owner read it

"""ONNX graphs in int8, by ONNX Runtime's quantiser."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from cn_clip.export.int8_inputs import Batch
from cn_clip.export.layers import ConvolutionQuantizer, float_layers
from cn_clip.export.precision import save_in_place
from cn_clip.export.quiet import quiet

_SMALLEST = 1 << 14  # values of a weight; smaller ones keep their precision


def quantize_convolutions(path: Path, images: Sequence[Batch]) -> None:
    """Quantise a convolutional image tower in place: static ranges, from calibration images.

    The layers that lose most keep float32; the matrices after the convolutions (of `mini`, a
    classifier and its softmax) are stored in int8 and computed with in float32.
    """
    with quiet():
        quantizer = ConvolutionQuantizer(path, images)
        kept = float_layers(quantizer.layers, quantizer.errors())
        model = quantizer.quantize(
            layer for n, layer in enumerate(quantizer.layers) if n not in kept
        )
    _store_in_int8(model, {name for n in kept for name in quantizer.layers[n].nodes})
    save_in_place(model, path)


def quantize_matrices(path: Path) -> None:
    """Quantise a transformer in place: int8 matrices, and activations with the range of each call.

    Static ranges lose more, since a few activations of a transformer are far larger than the rest
    (Dettmers et al., 2022, arXiv:2208.07339), and are slower: ViT-B/16 with random weights runs 2.7
    times as fast as in float32 at a mean cosine of 0.9995; with static ranges 2.1 times at 0.9989
    (two cores of AMD Zen 5, ONNX Runtime 1.32).
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, quiet():
        out = Path(folder) / "graph.onnx"
        _mark_prepared(path)
        quantize_dynamic(
            path,
            out,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
        model = onnx.load(out)
    _store_in_int8(model)
    save_in_place(model, path)


def _mark_prepared(path: Path) -> None:
    """Say that a graph needs no preparation; it has been simplified by the exporter."""
    model = onnx.load(path, load_external_data=False)
    helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    onnx.save(model, path)


def _store_in_int8(model: onnx.ModelProto, kept: Collection[str] = ()) -> None:
    """Store the remaining large weights of matrices and convolutions in int8, per output channel.

    Nodes named in ``kept`` keep float32. A ``Cast`` and a ``Mul`` turn each other weight back into
    float32; runtimes do this once, when they load the graph. (``DequantizeLinear`` would run for
    every batch.)
    """
    graph = model.graph
    axes = {}
    for node in graph.node:
        axis = _output_axis(node)
        if axis is not None and node.name not in kept:
            axes[node.input[1]] = axis
    weights = [w for w in graph.initializer if w.name in axes and w.data_type == TensorProto.FLOAT]
    for weight in weights:
        if np.prod(weight.dims) < _SMALLEST:
            continue
        name, values = weight.name, numpy_helper.to_array(weight)
        others = tuple(n for n in range(values.ndim) if n != axes[name] % values.ndim)
        scale = np.maximum(np.abs(values).max(others, keepdims=True) / 127, 1e-12)
        stored = np.rint(values / scale).astype(np.int8)
        weight.CopyFrom(numpy_helper.from_array(stored, f"{name}.int8"))
        factor = numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale")
        graph.initializer.append(factor)
        cast = helper.make_node("Cast", [weight.name], [f"{name}.float32"], to=TensorProto.FLOAT)
        multiply = helper.make_node("Mul", [f"{name}.float32", factor.name], [name])
        graph.node.insert(0, multiply)
        graph.node.insert(0, cast)


def _output_axis(node: Any) -> int | None:
    """Return the axis of a node's weight that belongs to its output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "MatMul":
        return -1
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return None

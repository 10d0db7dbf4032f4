"""The layers of a convolutional image tower, and how much each loses when it alone is int8."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from cn_clip.export.int8_inputs import Batch, evenly, loss
from cn_clip.processes import usable_cpus

# They have int8 kernels, and run fused with the convolution before them.
_FOLLOWING = ("Add", "AveragePool", "Clip", "MaxPool", "Relu")
_TYPES = ["Conv", *_FOLLOWING]
_IMAGES = 16  # for the errors of single layers
# The errors of layers add up: of `mini`, the sum is 0.008, half of it from the first two layers.
# With those in float32, it is 1.9 times as fast as all in float32; with a limit of 0.001, 1.2
# times. The mean cosines on the stamps of docs/mini.md are 0.997 and 0.999, and recall differs by
# 0.2 points.
_ALLOWED = 0.005
_MOST = 0.25  # share of the layers


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution and the operations that run fused with it, by name; ``before`` it, a layer."""

    nodes: tuple[str, ...]
    before: int | None


class ConvolutionQuantizer:
    """Quantises any of the convolutions of a graph; the ranges of tensors are measured once."""

    def __init__(self, path: Path, images: Sequence[Batch]) -> None:
        """Calibrate a float32 graph, which is not changed.

        Args:
            path: the graph; below 2 GB with its weights.
            images: float32 (1, 3, S, S).
        """
        self._images = evenly(images, _IMAGES)
        with tempfile.TemporaryDirectory() as folder:
            # One file: libraries refuse files of weights beside a graph behind a link.
            whole = Path(folder).resolve() / "graph.onnx"
            model = onnx.load(path)
            onnx.save(model, whole)
            calibrator = create_calibrator(
                whole, _TYPES, augmented_model_path=str(whole.with_name("outputs.onnx"))
            )
            self._input = model.graph.input[0].name
            calibrator.collect_data(_Reader(self._input, images))
            self._ranges = calibrator.compute_data()
            self._model = onnx.shape_inference.infer_shapes(model)
            self.layers = _layers(model.graph)

    def quantize(self, layers: Iterable[Layer]) -> onnx.ModelProto:
        """Return the graph with only these layers in int8.

        Weights are symmetric per output channel; activations are uint8, asymmetric, in the range
        from the smallest to the largest value seen. Of the other choices, percentiles and symmetric
        ranges were no better on `mini`, and int8 activations are slow without AVX-VNNI-INT8.
        """
        nodes = [name for layer in layers for name in layer.nodes]
        if not nodes:
            return self._model
        quantizer = QDQQuantizer(
            copy.deepcopy(self._model),
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self._ranges,
            nodes_to_quantize=nodes,
            nodes_to_exclude=[],
            op_types_to_quantize=_TYPES,
            extra_options={},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        model: onnx.ModelProto = quantizer.model.model
        return model

    def errors(self) -> list[float]:
        """Return for each layer the mean of 1 - cosine of the output, if it alone is int8."""
        expected = self._run(self._model)
        return [loss(self._run(self.quantize([layer])), expected) for layer in self.layers]

    def _run(self, model: onnx.ModelProto) -> Batch:
        options = ort.SessionOptions()
        options.intra_op_num_threads = usable_cpus()
        options.log_severity_level = 3
        session = ort.InferenceSession(model.SerializeToString(), options)
        return np.concatenate([session.run(None, {self._input: b})[0] for b in self._images])


def float_layers(layers: Sequence[Layer], errors: Sequence[float]) -> set[int]:
    """Return the layers to keep in float32: the worst, until the errors of the rest are small.

    With each of them goes the layer before, or its input would be int8 all the same. (Then ONNX
    Runtime would also quantise its weights, per tensor: seen to cost 0.03 of cosine.)
    """
    worst = sorted(range(len(layers)), key=lambda n: errors[n], reverse=True)
    kept: set[int] = set()
    for n in worst:
        rest = sum(error for m, error in enumerate(errors) if m not in kept)
        if rest <= _ALLOWED or len(kept) >= _MOST * len(layers):
            break
        before = layers[n].before
        kept |= {n} if before is None else {n, before}
    return kept


def _layers(graph: Any) -> list[Layer]:
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    layers: list[Layer] = []
    made_by: dict[str, int] = {}  # layer of each tensor
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        nodes = [node]
        while len(after := readers.get(nodes[-1].output[0], [])) == 1:
            if after[0].op_type not in _FOLLOWING:
                break
            nodes.append(after[0])
        layers.append(Layer(tuple(n.name for n in nodes), made_by.get(node.input[0])))
        made_by |= {n.output[0]: len(layers) - 1 for n in nodes}
    return layers


class _Reader:
    """Images as ONNX Runtime's calibrator reads them."""

    def __init__(self, name: str, images: Sequence[Batch]) -> None:
        self._batches = ({name: image} for image in images)

    def get_next(self) -> dict[str, Batch] | None:
        return next(self._batches, None)

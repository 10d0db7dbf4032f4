"""Float32 ONNX graphs turned into another format or precision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cn_clip.backends.exported import Graph, GraphPrecision, Runtime
from cn_clip.config import ModelConfig
from cn_clip.export.calibration import Calibration
from cn_clip.export.precision import to_float16


def convert_graphs(
    folder: Path,
    graphs: tuple[Graph, Graph],
    runtime: Runtime,
    precision: GraphPrecision,
    config: ModelConfig,
    calibration: Calibration | None,
    smooth_quant_alpha: float | None,
) -> tuple[Graph, Graph]:
    """Convert the image and the text graph in ``folder``; return their descriptions.

    Args:
        folder: with float32 ONNX graphs.
        graphs: of image and text.
        runtime: the format.
        precision: of the stored weights.
        config: of the model.
        calibration: for int8.
        smooth_quant_alpha: for transformers in int8 by NNCF; None is the default.
    """
    if runtime == "openvino":
        image, text = _openvino(folder, graphs, precision, config, calibration, smooth_quant_alpha)
        return image, text
    image, text = graphs
    if precision == "float16":
        for graph in graphs:
            to_float16(folder / graph.file)
    elif calibration is not None:
        from cn_clip.export.quantize import quantize_convolutions, quantize_matrices

        if config.vision.kind == "vit":
            quantize_matrices(folder / image.file)
        else:
            quantize_convolutions(folder / image.file, calibration)
        quantize_matrices(folder / text.file)
    return graphs


def _openvino(
    folder: Path,
    graphs: tuple[Graph, Graph],
    precision: GraphPrecision,
    config: ModelConfig,
    calibration: Calibration | None,
    alpha: float | None,
) -> Iterator[Graph]:
    from cn_clip.export import openvino  # it may not be installed

    if calibration is None:
        yield from (openvino.to_openvino(folder, graph, precision) for graph in graphs)
        return
    image, text = graphs
    alpha = openvino.SMOOTH_QUANT_ALPHA if alpha is None else alpha
    if config.vision.kind == "vit":
        yield openvino.transformer_to_int8(folder, image, calibration.images, alpha)
    else:
        yield openvino.convolutions_to_int8(folder, image, calibration.images)
    yield openvino.transformer_to_int8(folder, text, calibration.texts, alpha)

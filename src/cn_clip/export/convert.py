"""Float32 ONNX graphs turned into another format or precision."""

from __future__ import annotations

from pathlib import Path

from cn_clip.backends.exported import Graph, GraphPrecision, Runtime
from cn_clip.config import ModelConfig
from cn_clip.export.int8_inputs import Calibration


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
        smooth_quant_alpha: for transformers in int8 in OpenVINO; None is the default.
    """
    if precision == "int8":
        assert calibration is not None
        graphs = _to_int8(folder, graphs, runtime, config, calibration, smooth_quant_alpha)
    elif precision == "float16" and runtime == "onnx":
        from cn_clip.export.precision import to_float16

        for graph in graphs:
            to_float16(folder / graph.file)
    if runtime == "openvino":
        from cn_clip.export.openvino import to_openvino  # it may not be installed

        image, text = (
            graph if graph.file.endswith(".xml") else to_openvino(folder, graph, precision)
            for graph in graphs
        )
        return image, text
    return graphs


def _to_int8(
    folder: Path,
    graphs: tuple[Graph, Graph],
    runtime: Runtime,
    config: ModelConfig,
    calibration: Calibration,
    alpha: float | None,
) -> tuple[Graph, Graph]:
    """Quantise transformers with the runtime's own quantiser, convolutions with ONNX Runtime's.

    For `mini` in OpenVINO, on the stamps of docs/mini.md: with ONNX Runtime's quantiser the mean
    cosine is 0.997, with NNCF's 0.992.
    """
    from cn_clip.export.quantize import quantize_convolutions, quantize_matrices

    image, text = graphs
    towers = [(text, calibration.texts)]
    if config.vision.kind == "vit":
        towers.append((image, calibration.images))
    else:
        quantize_convolutions(folder / image.file, calibration.images)
    done = {}
    for graph, batches in towers:
        if runtime == "onnx":
            quantize_matrices(folder / graph.file)
        else:
            from cn_clip.export.openvino import SMOOTH_QUANT_ALPHA, transformer_to_int8

            alpha = SMOOTH_QUANT_ALPHA if alpha is None else alpha
            done[graph] = transformer_to_int8(folder, graph, batches, alpha)
    return done.get(image, image), done.get(text, text)

"""An ONNX graph in OpenVINO's own format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import openvino as ov

from cn_clip.backends.exported import Graph, GraphPrecision


def to_openvino(folder: Path, graph: Graph, precision: GraphPrecision) -> Graph:
    """Replace an ONNX graph in ``folder`` by its OpenVINO form; return its description."""
    source = folder / graph.file
    target = source.with_suffix(".xml")
    model = ov.Core().read_model(source)
    ov.save_model(model, target, compress_to_fp16=precision == "float16")
    del model  # it maps the weights
    source.unlink()
    source.with_name(f"{source.name}.data").unlink()
    return replace(graph, file=target.name)

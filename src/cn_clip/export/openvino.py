"""An ONNX graph in OpenVINO's own format, in int8 by NNCF."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import openvino as ov

from cn_clip.backends.exported import Graph, GraphPrecision
from cn_clip.export.int8_inputs import Batch
from cn_clip.export.quiet import quiet

SMOOTH_QUANT_ALPHA = 0.5  # of the SmoothQuant paper (Xiao et al., 2022, arXiv:2211.10438)


def to_openvino(folder: Path, graph: Graph, precision: GraphPrecision) -> Graph:
    """Replace an ONNX graph in ``folder`` by its OpenVINO form; return its description."""
    model = ov.Core().read_model(folder / graph.file)
    return _save(folder, graph, model, compress_to_fp16=precision == "float16")


def transformer_to_int8(
    folder: Path, graph: Graph, batches: Sequence[Batch], alpha: float = SMOOTH_QUANT_ALPHA
) -> Graph:
    """Replace an ONNX graph by an OpenVINO one, quantised with NNCF's preset for transformers.

    Args:
        folder: of the graph.
        graph: a transformer.
        batches: inputs for calibration.
        alpha: of SmoothQuant: the share of the difficulty that moves from activations to weights,
            from 0 to 1. -1: SmoothQuant is off.
    """
    with _nncf() as nncf:
        model = nncf.quantize(
            ov.convert_model(folder / graph.file),
            nncf.Dataset(batches),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=alpha)
            ),
        )
    return _save(folder, graph, model)


def _save(folder: Path, graph: Graph, model: ov.Model, compress_to_fp16: bool = False) -> Graph:
    source = folder / graph.file
    target = source.with_suffix(".xml")
    ov.save_model(model, target, compress_to_fp16=compress_to_fp16)
    del model  # it maps the weights
    source.unlink()
    source.with_name(f"{source.name}.data").unlink()
    return replace(graph, file=target.name)


@contextlib.contextmanager
def _nncf() -> Iterator[Any]:
    """Yield NNCF, silent: it and the converter send usage data unless they believe to run in CI."""
    before = {name: os.environ.get(name) for name in ("CI", "NNCF_CI")}
    logger_class = logging.getLoggerClass()
    os.environ |= {"CI": "true", "NNCF_CI": "1"}
    try:
        import nncf  # takes seconds, and needs the real stdout

        logging.setLoggerClass(logger_class)
        with quiet("nncf"):
            yield nncf
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

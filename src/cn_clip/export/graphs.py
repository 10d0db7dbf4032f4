"""The two towers as ONNX graphs, with named dynamic axes."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from cn_clip.backends.exported import Graph
from cn_clip.errors import CheckpointError
from cn_clip.export.quiet import quiet
from cn_clip.model.clip import CLIP

OPSET = 20
_MAX_BATCH = 1 << 20


class _ImageTower(nn.Module):
    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)


class _TextTower(nn.Module):
    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)


def write_graphs(model: CLIP, folder: Path, image: Graph, text: Graph) -> None:
    """Write both towers of a float32 model as ONNX, each with one file of weights beside it.

    The image graph maps float32 (batch, 3, S, S) to features (batch, D), the text graph int64
    (batch, length), 0 for padding, to features (batch, D). Axes 'batch' and 'length' are dynamic.

    Raises:
        CheckpointError: the exporter turned a dynamic axis into a constant.
    """
    config = model.config
    size, longest = config.vision.resolution, config.context_length
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    length = torch.export.Dim("length", min=2, max=longest)
    # Example sizes that no constant of a model equals, so that none is mistaken for an axis.
    pixels = torch.zeros(3, 3, size, size)
    ids = torch.ones(3, longest - 1, dtype=torch.int64)
    ids[1, longest // 2 :] = 0
    _write(_ImageTower(model), pixels, {0: batch}, folder, image)
    _write(_TextTower(model), ids, {0: batch, 1: length}, folder, text)
    _check_axes(folder / image.file, ["batch", 3, size, size], ["batch", config.embed_dim])
    _check_axes(folder / text.file, ["batch", "length"], ["batch", config.embed_dim])


def _write(
    tower: nn.Module,
    example: Tensor,
    axes: dict[int, torch.export.Dim],
    folder: Path,
    graph: Graph,
) -> None:
    with quiet("torch.onnx"):
        program = torch.onnx.export(
            tower.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[graph.input],
            output_names=[graph.output],
            dynamic_shapes=(axes,),
            verbose=False,
        )
    assert program is not None
    program.save(folder / graph.file, external_data=True)


def _check_axes(path: Path, inputs: list[str | int], outputs: list[str | int]) -> None:
    graph = onnx.load(path, load_external_data=False).graph
    for value, expected in ((graph.input[0], inputs), (graph.output[0], outputs)):
        axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        if axes != expected:
            raise CheckpointError(
                f"the exporter of torch {torch.__version__} wrote {value.name} of shape {axes} "
                f"instead of {expected}; use another version of torch"
            )

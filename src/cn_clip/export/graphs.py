"""The two towers as ONNX graphs, with named dynamic axes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cn_clip.backends.exported import Graph
from cn_clip.errors import CheckpointError
from cn_clip.export.quiet import quiet
from cn_clip.model.clip import CLIP
from cn_clip.translation import _

OPSET = 20
_MAX_BATCH = 1 << 20


class _ImageTower(nn.Module):
    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values)


class _TextTower(nn.Module):
    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.encode_text(input_ids)


class Tower(NamedTuple):
    """A tower to be traced: the module, an example input and the input's dynamic axes."""

    module: nn.Module
    example: Tensor
    axes: dict[int, torch.export.Dim]


def towers(model: CLIP, max_batch: int) -> tuple[Tower, Tower]:
    """Return the image and the text tower of a model, with axes 'batch' and 'length' dynamic."""
    config = model.config
    size, longest = config.vision.resolution, config.context_length
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    length = torch.export.Dim("length", min=2, max=longest)
    # Example sizes that no constant of a model equals, so that none is mistaken for an axis.
    pixels = torch.zeros(3, 3, size, size)
    ids = torch.ones(3, longest - 1, dtype=torch.int64)
    ids[1, longest // 2 :] = 0
    return (
        Tower(_ImageTower(model).eval(), pixels, {0: batch}),
        Tower(_TextTower(model).eval(), ids, {0: batch, 1: length}),
    )


def write_graphs(model: CLIP, folder: Path, image: Graph, text: Graph) -> None:
    """Write both towers of a float32 model as ONNX, each with one file of weights beside it.

    The image graph maps float32 (batch, 3, S, S) to features (batch, D), the text graph int64
    (batch, length), 0 for padding, to features (batch, D). Axes 'batch' and 'length' are dynamic.

    Raises:
        CheckpointError: the exporter turned a dynamic axis into a constant.
    """
    config = model.config
    size = config.vision.resolution
    for tower, graph in zip(towers(model, _MAX_BATCH), (image, text), strict=True):
        _write(tower, folder / graph.file, graph)
    _check_axes(folder / image.file, ["batch", 3, size, size], ["batch", config.embed_dim])
    _check_axes(folder / text.file, ["batch", "length"], ["batch", config.embed_dim])


def _write(tower: Tower, path: Path, graph: Graph) -> None:
    with quiet("torch.onnx"):
        program = torch.onnx.export(
            tower.module,
            (tower.example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[graph.input],
            output_names=[graph.output],
            dynamic_shapes=(tower.axes,),
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=True)


def _check_axes(path: Path, inputs: list[str | int], outputs: list[str | int]) -> None:
    import onnx  # checked to be installed by export()

    graph = onnx.load(path, load_external_data=False).graph
    for value, expected in ((graph.input[0], inputs), (graph.output[0], outputs)):
        axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        if axes != expected:
            raise CheckpointError(
                _(
                    "the exporter of torch {version} wrote {name} of shape {axes} instead of "
                    "{expected}; use another version of torch",
                    version=torch.__version__,
                    name=value.name,
                    axes=axes,
                    expected=expected,
                )
            )

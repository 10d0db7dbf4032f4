"""The commands that build TensorRT engines of ONNX graphs, as a script. They are not run here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from cn_clip.backends.exported import Graph
from cn_clip.config import ModelConfig
from cn_clip.translation import _

FOLDER, SCRIPT = "tensorrt", "build.sh"
_BATCHES = (1, 8, 64)  # smallest, usual and largest
_USUAL_LENGTH = 16  # of a text, in tokens
_HEAD = """\
#!/bin/sh
# Builds TensorRT engines of the ONNX graphs in the folder above, with trtexec of TensorRT 10.
#
# NEVER RUN by cn-clip: it was written without a machine that has TensorRT. Compare the embeddings
# of the engines with ../golden/golden.json before use.
#
# --fp16 computes in float16 where that is faster. TensorRT 11 no longer has this option and takes
# the precision from the graph: run FLAGS= sh build.sh there.
set -eu
cd "$(dirname "$0")"
FLAGS=${FLAGS-%s}
"""


def write_tensorrt(
    folder: Path, config: ModelConfig, image: Graph, text: Graph, precision: str
) -> None:
    """Write a script that builds one engine per graph, for 1 to 64 rows and texts of any length.

    Args:
        folder: to be written, inside the folder with the graphs.
        config: of the model.
        image: its input is (batch, 3, S, S).
        text: its input is (batch, length).
        precision: ``"float16"`` lets TensorRT compute in float16.
    """
    size, longest = config.vision.resolution, config.context_length
    images = [(batch, 3, size, size) for batch in _BATCHES]
    lengths = (2, min(_USUAL_LENGTH, longest), longest)
    texts = list(zip(_BATCHES, lengths, strict=True))
    folder.mkdir()
    script = "".join(
        [
            _HEAD % ("--fp16" if precision == "float16" else ""),
            _command("image", image, images),
            _command("text", text, texts),
        ]
    )
    (folder / SCRIPT).write_text(script, encoding="utf-8")


def _command(name: str, graph: Graph, profile: Sequence[tuple[int, ...]]) -> str:
    shapes = (
        f"--{kind}Shapes={graph.input}:{'x'.join(map(str, shape))}"
        for kind, shape in zip(("min", "opt", "max"), profile, strict=True)
    )
    onnx = shlex.quote(f"--onnx=../{graph.file}")
    return _(
        "\ntrtexec {onnx} --saveEngine={name}.engine $FLAGS \\\n  {shapes}\n",
        onnx=onnx,
        name=name,
        shapes=" ".join(shapes),
    )

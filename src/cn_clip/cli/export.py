"""``cn-clip export``: a model as graphs for other runtimes."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

from rich.markup import escape
from rich.table import Table

from cn_clip.cli.show import Flag, console, print_json

if TYPE_CHECKING:
    from cn_clip.export import ExportResult


def export(
    *,
    model: str = "mini",
    to: Literal["onnx", "openvino"] = "onnx",
    out: str | None = None,
    precision: Literal["float32", "float16", "int8"] = "float32",
    images: str | None = None,
    official_names: Flag = False,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Export a model as graphs that run without torch, verified against the original.

    Writes two graphs (image and text, any batch size and text length), the tokenizer, the
    preprocessing and golden vectors, with which the export can be tested in any language. Real
    images and texts run through the export and the original; if they differ, nothing is written.

    Parameters
    ----------
    model
        A name from `cn-clip models`, org/name on a hub, or the path of a checkpoint.
    to
        The format: onnx, for ONNX Runtime and others; openvino, for OpenVINO alone, which runs
        onnx too.
    out
        A new folder. Default: the cache folder, where --backend finds the export of this model.
    precision
        Of the stored weights. float16 halves the files and computes in float32.
    images
        A folder of images to compare, besides the sample in the package.
    official_names
        Name files, inputs and outputs as the official exporter does.
    overwrite
        Replace OUT if this command wrote it.
    json
        Print JSON instead of a table.
    """
    from cn_clip.export import export as run  # slow to import
    from cn_clip.image.decode import find_images

    result = run(
        model,
        out,
        to=to,
        precision=precision,
        images=find_images([images]) if images else (),
        official_names=official_names,
        overwrite=overwrite,
    )
    if json:
        print_json(asdict(result))
    else:
        console().print(_table(result))


def _table(result: ExportResult) -> Table:
    parity = result.parity
    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    for key, value in {
        "model": result.model,
        "wrote": f"{os.path.normpath(result.out)} ({result.runtime}, {result.precision}, "
        f"{result.bytes / 1e6:,.1f} MB)",
        "images": f"cosine to the original at least {parity.image_cosine[0]:.6f}, mean "
        f"{parity.image_cosine[1]:.6f}, of {parity.images}",
        "texts": f"cosine to the original at least {parity.text_cosine[0]:.6f}, mean "
        f"{parity.text_cosine[1]:.6f}, of {parity.texts}",
        "top 10": f"{parity.top10_agreement:.1%} of the 10 best images of a text are the same",
    }.items():
        table.add_row(key, escape(value))
    return table

"""``cn-clip models``: the models that load by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from cn_clip import hub
from cn_clip.cli.show import Flag, console, print_json
from cn_clip.config import MODELS, PUBLISHED, ModelConfig
from cn_clip.translation import N_, _, translate


def models(
    *,
    download_root: str | None = None,
    json: Flag = False,
) -> None:
    """List the models that load by name, with their size and where their weights are.

    Parameters
    ----------
    download_root
        A folder to look into first.
    json
        Print JSON instead of a table.
    """
    rows = [_describe(name, hub.find(name, download_root)) for name in hub.names()]
    if json:
        print_json({"models": rows})
        return
    table = Table(box=None, header_style="dim")
    for heading in (
        N_("name"),
        N_("image tower"),
        N_("text tower"),
        N_("parameters"),
        N_("pixels"),
        N_("dim"),
        N_("path"),
    ):
        table.add_column(
            translate(heading), justify="right" if heading in _RIGHT_ALIGNED else "left"
        )
    for row in rows:
        path = row["path"] or _("to be downloaded: {file}", file=row["file"])
        table.add_row(
            row["name"],
            row["image_tower"],
            row["text_tower"],
            f"{row['parameters'] / 1e6:.0f} M",
            str(row["resolution"]),
            str(row["dim"]),
            _("in the package") if row["name"] == hub.EMBEDDED else path,
        )
    console().print(table)


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm
_RIGHT_ALIGNED = ("parameters", "pixels", "dim")
_KINDS = {"vit": "ViT", "resnet": "ResNet", "efficientnet_lite": "EfficientNet-Lite0"}


def _describe(name: str, path: Path | None) -> dict[str, Any]:
    published = PUBLISHED.get(name)
    config = MODELS[name] if published else _embedded_config(path)
    text = config.text
    return {
        "name": name,
        "image_tower": published.vision if published else _KINDS[config.vision.kind],
        "text_tower": published.text if published else f"BERT {text.layers}x{text.hidden_size}",
        "parameters": published.parameters if published else _embedded_parameters(path),
        "resolution": config.vision.resolution,
        "dim": config.embed_dim,
        "file": published.filename if published else None,
        "path": str(path) if path else None,
    }


def _embedded_config(path: Path | None) -> ModelConfig:
    from cn_clip.weights import read_config

    assert path is not None  # it is part of the package
    return read_config(path)


def _embedded_parameters(path: Path | None) -> int:
    """Count the parameters in the weights' header, without torch."""
    from safetensors import safe_open

    assert path is not None
    with safe_open(path / "model.safetensors", "numpy") as tensors:
        names = [name for name in tensors.keys() if not name.endswith(_STATISTICS)]  # noqa: SIM118
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)

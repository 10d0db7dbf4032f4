"""The official script that exports to ONNX: ``python -m cn_clip.deploy.pytorch_to_onnx``.

The graphs take any batch size and text length, and are verified before they are written.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip.cli.official import parser_of, run_script
from cn_clip.config import PUBLISHED, model_config
from cn_clip.errors import UsageError
from cn_clip.translation import _

if TYPE_CHECKING:
    from cn_clip.backends.exported import GraphPrecision

_PRECISIONS: dict[GraphPrecision, str] = {"float32": "fp32", "float16": "fp16"}


def main(arguments: Sequence[str]) -> int:
    """Write the graphs of the towers in float32 and float16; return the exit code."""
    from cn_clip import weights
    from cn_clip.hub import locate
    from cn_clip.outputs import claim, own_file, starts_with
    from cn_clip.publish import map_write_errors

    options = _parser().parse_args(arguments)
    towers = ["txt"] if options.convert_text else []
    towers += ["img"] if options.convert_vision else []
    if not towers:
        raise UsageError(_("nothing to convert; give --convert-text, --convert-vision, or both"))
    prefix = Path(options.save_onnx_path)
    names = [f"{prefix}.{t}.{p}.onnx" for t in towers for p in _PRECISIONS.values()]
    for name in names:
        claim(name, own_file("export", starts_with(b"\x08")), option="--save-onnx-path")
    checkpoint = options.pytorch_ckpt_path
    if checkpoint is None:
        checkpoint = locate(options.model_arch, download_root=options.download_root)
    expected = model_config(PUBLISHED[options.model_arch].struct)
    weights.check_model(weights.read(checkpoint, mapped=True).config, expected, checkpoint)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with map_write_errors(prefix):
        for path in _export(str(checkpoint), prefix, towers):
            print(_("wrote {path}", path=path))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("pytorch_to_onnx", "cn-clip export --official-names")
    parser.add_argument("--model-arch", required=True, choices=list(PUBLISHED))
    parser.add_argument("--pytorch-ckpt-path")
    parser.add_argument("--download-root")
    parser.add_argument("--save-onnx-path", required=True)
    parser.add_argument("--convert-text", action="store_true")
    parser.add_argument("--convert-vision", action="store_true")
    parser.add_argument("--context-length", type=int, default=52)
    return parser


def _export(checkpoint: str, prefix: Path, towers: list[str]) -> Iterator[Path]:
    """Export to a folder beside the files, then move the graphs of the towers to their places."""
    from cn_clip.export import export
    from cn_clip.publish import temporary_beside

    with temporary_beside(prefix) as work:
        for precision, short in _PRECISIONS.items():
            folder = work / short / prefix.name
            export(checkpoint, folder, precision=precision, official_names=True)
            for tower in towers:
                for file in sorted(folder.glob(f"{prefix.name}.{tower}.{short}.onnx*")):
                    os.replace(file, prefix.parent / file.name)
                    yield prefix.parent / file.name


if __name__ == "__main__":
    run_script(main)

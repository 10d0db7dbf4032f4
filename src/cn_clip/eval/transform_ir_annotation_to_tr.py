"""The official script that turns annotations of texts into annotations of images:
``python -m cn_clip.eval.transform_ir_annotation_to_tr --input test_texts.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cn_clip.cli.official import parser_of, run_script
from cn_clip.translation import _


def main(arguments: Sequence[str]) -> int:
    """Write ``X.tr.jsonl`` beside ``X.jsonl``; return the exit code."""
    from cn_clip.eval.official_files import claim_lines, read_truth, write_image_annotations

    parser = parser_of("transform_ir_annotation_to_tr", "cn-clip eval retrieval --out FOLDER")
    parser.add_argument("--input", required=True)
    options = parser.parse_args(arguments)
    out = f"{options.input.replace('.jsonl', '')}.tr.jsonl"
    claim_lines(out, option="--input", inputs=[options.input])
    write_image_annotations(read_truth(Path(options.input)), Path(out))
    print(_("the annotations of the images are in {out}", out=out))
    return 0


if __name__ == "__main__":
    run_script(main)

"""The official script that searches images by texts:
``python -m cn_clip.eval.make_topk_predictions``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip.cli.official import parser_of, run_script
from cn_clip.translation import _

if TYPE_CHECKING:
    from cn_clip.eval.official_files import Direction


def main(arguments: Sequence[str]) -> int:
    """Write the best images of every text; return the exit code."""
    return predict("text_to_image", "make_topk_predictions", arguments)


def predict(direction: Direction, script: str, arguments: Sequence[str]) -> int:
    """Write the best results of every query of a direction; return the exit code."""
    from cn_clip.embeddings.files import read_embeddings
    from cn_clip.eval.official_files import claim_lines, write_predictions

    parser = parser_of(script, "cn-clip eval retrieval --out FOLDER")
    parser.add_argument("--image-feats", required=True)
    parser.add_argument("--text-feats", required=True)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--eval-batch-size", type=int, default=32768)
    parser.add_argument("--output", required=True)
    options = parser.parse_args(arguments)
    out = claim_lines(options.output, inputs=[options.image_feats, options.text_feats])
    images = read_embeddings(Path(options.image_feats), "images")
    texts = read_embeddings(Path(options.text_feats), "texts")
    queries, results = (texts, images) if direction == "text_to_image" else (images, texts)
    write_predictions(direction, queries, results, out, k=options.top_k)
    print(
        _(
            "the top {k} of {count:,} queries are in {out}",
            k=options.top_k,
            count=len(queries.ids),
            out=out,
        )
    )
    return 0


if __name__ == "__main__":
    run_script(main)

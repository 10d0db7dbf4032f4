"""The official script that embeds: ``python -m cn_clip.eval.extract_features``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cn_clip.cli.official import add_model_arguments, load_checkpoint, parser_of, run_script
from cn_clip.errors import UsageError
from cn_clip.translation import _

if TYPE_CHECKING:
    from cn_clip.embedder import Embedder
    from cn_clip.embeddings.inputs import Kind


def main(arguments: Sequence[str]) -> int:
    """Write the features of images and texts; return the exit code."""
    options = _parser().parse_args(arguments)
    kinds: list[Kind] = []
    kinds += ["texts"] if options.extract_text_feats else []
    kinds += ["images"] if options.extract_image_feats else []
    if not kinds:
        raise UsageError(
            _("nothing to extract; give --extract-image-feats, --extract-text-feats, or both")
        )
    embedder = load_checkpoint(options)
    embedder.batch_size = options.img_batch_size
    return max([_extract(embedder, kind, options) for kind in kinds])


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("extract_features", "cn-clip embed images, cn-clip embed texts")
    parser.add_argument("--extract-image-feats", action="store_true")
    parser.add_argument("--extract-text-feats", action="store_true")
    parser.add_argument("--image-data", default="../Multimodal_Retrieval/lmdb/test/imgs")
    parser.add_argument("--text-data", default="../Multimodal_Retrieval/test_texts.jsonl")
    parser.add_argument("--image-feat-output-path")
    parser.add_argument("--text-feat-output-path")
    parser.add_argument("--text-batch-size", type=int, default=64)
    parser.add_argument("--debug", action="store_true")
    add_model_arguments(parser)
    return parser


def _extract(embedder: Embedder, kind: Kind, options: argparse.Namespace) -> int:
    from cn_clip.cli.show import progress_bar
    from cn_clip.embeddings.extract import extract
    from cn_clip.embeddings.inputs import read_images, read_texts

    texts = options.text_data
    if kind == "texts":
        source, items = texts, read_texts([texts])
        out = options.text_feat_output_path or f"{texts.removesuffix('.jsonl')}.txt_feat.jsonl"
    else:
        source, items = options.image_data, read_images([options.image_data])
        stem = texts.replace("_texts.jsonl", "_imgs")
        out = options.image_feat_output_path or f"{stem}.img_feat.jsonl"
    with progress_bar(_("embedding {kind}", kind=kind)) as on_progress:
        done = extract(
            embedder,
            kind,
            items,
            out,
            inputs=[source, options.resume],
            overwrite=True,
            on_progress=on_progress,
        )
    for _id, reason in done.failed:
        print(f"cn-clip: {reason}", file=sys.stderr)
    print(_("{count:,} features of {kind} are in {out}", count=done.written, kind=kind, out=out))
    return 1 if done.failed else 0


if __name__ == "__main__":
    run_script(main)

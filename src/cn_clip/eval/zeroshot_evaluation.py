"""The official script for zero-shot classification: ``python -m cn_clip.eval.zeroshot_evaluation``.

Writes ``SAVE_DIR/DATASET.json``, a submission to ELEVATER's server.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from cn_clip.cli.official import add_model_arguments, load_checkpoint, parser_of, run_script
from cn_clip.translation import _


def main(arguments: Sequence[str]) -> int:
    """Classify the images of all classes; return the exit code."""
    from cn_clip.cli.show import progress_bar
    from cn_clip.eval import zeroshot
    from cn_clip.eval.labelled import read_split
    from cn_clip.publish import write_text

    options = _parser().parse_args(arguments)
    out = os.path.join(options.save_dir, f"{options.dataset}.json")
    inputs = [options.datapath, options.label_file, options.resume]
    zeroshot.claim_submission(out, inputs=inputs)
    order = Path(options.index) if options.index else None
    images = read_split(Path(options.datapath), Path(options.label_file), order=order)
    info = zeroshot.datasets().get(options.dataset, zeroshot.DatasetInfo())
    embedder = load_checkpoint(options)
    embedder.batch_size = options.img_batch_size
    with progress_bar(_("classifying images")) as tick:
        scores = zeroshot.evaluate_zeroshot(
            embedder,
            images,
            zeroshot.read_templates(info.templates),
            tick=lambda task, done, total: tick(done, total),
        )
    count = embedder.parameter_count
    submitted = zeroshot.submission(
        scores,
        images,
        model=options.vision_model or embedder.name,
        dataset=options.dataset,
        parameters=count.total,
        visual=count.image,
    )
    write_text(out, json.dumps(submitted))
    print(
        _(
            "zeroshot-top1: {top1} of {images:,} images; the probabilities are in {out}",
            top1=scores.top1,
            images=scores.images,
            out=out,
        )
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("zeroshot_evaluation", "cn-clip eval zeroshot")
    parser.add_argument("--label-file", required=True)
    parser.add_argument("--datapath", required=True)
    parser.add_argument("--dataset", default="imagenet")
    parser.add_argument("--index", default="")
    parser.add_argument("--save-dir", default="")
    parser.add_argument("--num-workers", type=int, default=4)
    add_model_arguments(parser)
    return parser


if __name__ == "__main__":
    run_script(main)

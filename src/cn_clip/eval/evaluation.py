"""The official script that scores text-to-image predictions: ``python -m cn_clip.eval.evaluation
ANNOTATIONS PREDICTIONS OUT``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip.cli.official import parser_of, run_script
from cn_clip.errors import DataError
from cn_clip.translation import _

if TYPE_CHECKING:
    from cn_clip.eval.official_files import Direction, PredictionScores


def main(arguments: Sequence[str]) -> int:
    """Score predictions of images for texts; return the exit code."""
    return score("text_to_image", "evaluation", arguments)


def score(direction: Direction, script: str, arguments: Sequence[str]) -> int:
    """Score predictions of a direction, and write the official metrics, also of a failure."""
    from cn_clip.eval.official_files import claim_metrics, write_failure, write_metrics

    parser = parser_of(script, "cn-clip eval predictions PREDICTIONS --truth ANNOTATIONS")
    for name in ("annotations", "predictions", "out"):
        parser.add_argument(name)
    options = parser.parse_args(arguments)
    out = claim_metrics(options.out, inputs=[options.annotations, options.predictions])
    try:
        scores = _scores(direction, Path(options.annotations), Path(options.predictions))
    except DataError as error:
        write_failure(str(error), out)
        raise
    write_metrics(scores.recall, out)
    recall = scores.recall
    print(
        _(
            "R@1 {r1:.2f} %, R@5 {r5:.2f} %, R@10 {r10:.2f} %, mean recall {mean:.2f} % of "
            "{queries:,} queries, in {out}",
            r1=100 * recall.r1,
            r5=100 * recall.r5,
            r10=100 * recall.r10,
            mean=100 * recall.mean,
            queries=scores.queries,
            out=out,
        )
    )
    return 0


def _scores(direction: Direction, annotations: Path, predictions: Path) -> PredictionScores:
    from cn_clip.eval.official_files import read_predictions, read_truth, score_predictions

    read = read_predictions(predictions)
    if read.direction != direction:
        raise DataError(
            _(
                "{path} has predictions of the other direction; use evaluation for "
                "text_id, evaluation_tr for image_id",
                path=predictions,
            )
        )
    return score_predictions(read, read_truth(annotations))


if __name__ == "__main__":
    run_script(main)

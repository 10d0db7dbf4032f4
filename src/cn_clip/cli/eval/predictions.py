"""``cn-clip eval predictions``: scores of a predictions file, as in the official evaluation."""

from __future__ import annotations

from pathlib import Path

from cn_clip.cli.eval.retrieval import percent, recall_table
from cn_clip.cli.show import Flag, console, print_json
from cn_clip.translation import _


def predictions(
    predictions: str, /, *, truth: str, out: str | None = None, json: Flag = False
) -> int:
    """Score a file of predictions as the official evaluation scripts do.

    The keys of the file determine the direction. Ids are integers or strings.

    Parameters
    ----------
    predictions
        A .jsonl with text_id and image_ids, or image_id and text_ids: at least 10, best first.
    truth
        The official annotations, a .jsonl with text_id and image_ids (or image_id and text_ids).
    out
        Write the official metrics JSON to this file.
    json
        Print JSON instead of a table.
    """
    from cn_clip.eval.official_files import (
        claim_metrics,
        read_predictions,
        read_truth,
        score_predictions,
        write_metrics,
    )

    if out is not None:
        claim_metrics(out, inputs=[predictions, truth])
    scores = score_predictions(read_predictions(Path(predictions)), read_truth(Path(truth)))
    if out is not None:
        write_metrics(scores.recall, Path(out))
    if json:
        print_json(
            {
                "direction": scores.direction,
                "queries": scores.queries,
                "extra": scores.extra,
                **percent(scores.recall),
            }
        )
        return 0
    console().print(recall_table(predictions, {scores.direction: scores.recall}))
    extra = _("; {extra:,} more are not in the annotations and are ignored", extra=scores.extra)
    extra = extra if scores.extra else ""
    console().print(
        _("{queries:,} queries{extra}", queries=scores.queries, extra=extra), markup=False
    )
    return 0

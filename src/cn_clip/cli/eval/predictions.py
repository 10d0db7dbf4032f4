"""``cn-clip eval predictions``: the official evaluator, for files of predictions."""

from __future__ import annotations

from pathlib import Path

from cn_clip.cli.eval.retrieval import percent, recall_table
from cn_clip.cli.show import Flag, console, print_json


def predictions(
    predictions: str, /, *, truth: str, out: str | None = None, json: Flag = False
) -> int:
    """Score a file of predictions, as the official evaluation scripts do.

    Which direction it is of, the file tells itself. Ids may be numbers or strings.

    Parameters
    ----------
    predictions
        A .jsonl with text_id and image_ids, or image_id and text_ids, the best first, 10 or more.
    truth
        The official annotations, a .jsonl with text_id and image_ids (or image_id and text_ids).
    out
        Write the official metrics JSON there.
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
    scored = score_predictions(read_predictions(Path(predictions)), read_truth(Path(truth)))
    if out is not None:
        write_metrics(scored.recall, Path(out))
    if json:
        print_json(
            {
                "direction": scored.direction,
                "queries": scored.queries,
                "extra": scored.extra,
                **percent(scored.recall),
            }
        )
        return 0
    console().print(recall_table(predictions, {scored.direction: scored.recall}))
    besides = f"; {scored.extra:,} more were predicted for, and do not count"
    console().print(f"{scored.queries:,} queries{besides if scored.extra else ''}", markup=False)
    return 0

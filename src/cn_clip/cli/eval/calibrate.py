"""``cn-clip eval calibrate``: what a model's cosines mean."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from cn_clip.cli.loading import model_paths
from cn_clip.cli.show import Amount, Flag, check_different_paths, console, print_json, progress
from cn_clip.config import Precision

_LISTED = 20  # pictures that failed; --json has all


def calibrate(
    *,
    data: str,
    out: str,
    # The option of that name elsewhere is the model's; here it is what users ask for.
    precision: float = 0.9,
    kind: Literal["logistic", "isotonic"] = "logistic",
    prior: float = 0.5,
    seed: Amount = 0,
    report: str | None = None,
    model: str = "mini",
    device: str = "auto",
    model_precision: Precision = "auto",
    fast_decode: Flag = False,
    download_root: str | None = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> int:
    """Fit what this model's cosines mean, on pairs of pictures and texts.

    OUT then gives, for a cosine, the probability that picture and text match, and the cosine below
    which the best of a search or of some labels is no match. It is fitted twice: on half of the
    pictures, to be judged on the other half, which is what is printed; then on all of them.

    Parameters
    ----------
    data
        The pairs: KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar.
    out
        A new .json file, for `cn-clip classify --calibration`.
    precision
        The share of answers at or above a threshold that shall be right.
    kind
        logistic needs few pairs; isotonic follows any rising curve, and needs thousands.
    prior
        The share of matches among the pairs that the probability is for.
    seed
        Of the halves, and of the non-pairs and labels that are drawn.
    report
        Write a page with the reliability diagram to this .html file.
    model
        A name from `cn-clip models`, org/name on a hub, or the path of a checkpoint.
    device
        cpu, cuda, mps, or auto.
    model_precision
        float32, bfloat16, float16, or auto. A calibration holds for one of them.
    fast_decode
        Decode large JPEG files at reduced size; a calibration holds with or without.
    download_root
        Where official weights are looked for, and downloaded to.
    overwrite
        Replace what this command wrote at OUT.
    json
        Print JSON instead of a table.
    """
    from cn_clip.calibration import claim_calibration, write_calibration
    from cn_clip.data.sources.open import open_mix, paths_of
    from cn_clip.embedder import load
    from cn_clip.eval.calibration.fit import calibrate
    from cn_clip.eval.calibration.report import write_report
    from cn_clip.eval.dataset import eval_set_of
    from cn_clip.eval.embedded_dataset import embed_pairs
    from cn_clip.html.page import claim_page

    inputs = [*paths_of(data), *map(Path, model_paths(model))]
    claim_calibration(out, inputs=inputs, overwrite=overwrite)
    if report is not None:
        claim_page(report, "eval calibrate", inputs=inputs)
        check_different_paths(out, report)
    found = eval_set_of(open_mix([data]))
    embedder = load(
        model,
        device=device,
        precision=model_precision,
        fast_decode=fast_decode,
        download_root=download_root,
    )
    with progress() as bars:
        task = bars.add_task("embedding pictures", total=None)
        embedded = embed_pairs(
            embedder,
            found,
            tick=lambda done, total: bars.update(task, completed=done, total=total),
        )
    calibration, held_out = calibrate(
        embedded.images,
        embedded.texts,
        embedded.pairs,
        model=embedder.name,
        fingerprint=embedder.fingerprint,
        data=embedded.digest,
        kind=kind,
        precision=precision,
        prior=prior,
        seed=seed,
    )
    write_calibration(calibration, Path(out))
    if report is not None:
        write_report(calibration, held_out, Path(report))
    for sentence in embedded.failed[:_LISTED]:
        print(f"cn-clip: {sentence}", file=sys.stderr)
    if len(embedded.failed) > _LISTED:
        print(f"cn-clip: and {len(embedded.failed) - _LISTED:,} more", file=sys.stderr)
    for use, threshold in calibration.thresholds.items():
        if threshold is None:
            print(
                f"cn-clip: warning: no cosine makes {precision:.0%} of the answers right for "
                f"{use}, so nothing is told apart there; give a lower --precision",
                file=sys.stderr,
            )
    if json:
        print_json(
            {
                "out": out,
                "model": calibration.model,
                "kind": calibration.kind,
                "coefficients": asdict(calibration.curve),
                "prior": prior,
                "precision": precision,
                "thresholds": dict(calibration.thresholds),
                "counts": dict(calibration.counts),
                "held_out": asdict(held_out),
                "failed": embedded.failed,
            }
        )
    else:
        _print(calibration, held_out, out)
    return 1 if embedded.failed else 0


def _print(calibration: Any, held_out: Any, out: str) -> None:
    from cn_clip.eval.calibration.fit import FIXED_CUTOFF

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("held-out half", "calibrated", f"cosine ≥ {FIXED_CUTOFF}"):
        table.add_column(column, justify="left" if column == "held-out half" else "right")
    judged, fixed = held_out.calibrated, held_out.fixed
    table.add_row("expected calibration error", f"{judged.ece:.3f}", f"{fixed.ece:.3f}")
    table.add_row("Brier score", f"{judged.brier:.3f}", f"{fixed.brier:.3f}")
    table.add_row("judged rightly", f"{judged.right:.1%}", f"{fixed.right:.1%}")
    for use, here in held_out.answers.items():
        there = held_out.fixed_answers[use]
        for name, mine, theirs in (
            ("answers that are right", here.precision, there.precision),
            ("answered, of what is there", here.answered, there.answered),
            ("told nothing, of what is not", here.refused, there.refused),
        ):
            shown = ["none" if share is None else f"{share:.1%}" for share in (mine, theirs)]
            table.add_row(f"{use}: {name}", *shown)
    counts = calibration.counts
    console().print(table)
    console().print(
        f"{out}: {calibration.kind}, fitted on all {counts['pairs']:,} pairs of "
        f"{counts['images']:,} pictures, for {calibration.model}",
        markup=False,
    )

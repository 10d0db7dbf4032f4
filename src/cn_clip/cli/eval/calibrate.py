"""``cn-clip eval calibrate``: fit the probability of a match, and thresholds for no match."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from cn_clip.cli.loading import model_paths
from cn_clip.cli.show import (
    Amount,
    Flag,
    check_different_paths,
    console,
    list_failed,
    print_json,
    progress_bar,
)
from cn_clip.config import Precision
from cn_clip.translation import N_, _, translate

if TYPE_CHECKING:
    from cn_clip.calibration import Calibration
    from cn_clip.eval.calibration.fit import CalibrationScores, HeldOut
    from cn_clip.eval.calibration.thresholds import ThresholdEffect


def calibrate(
    *,
    data: str,
    out: str,
    # Elsewhere --precision is the model's; here it is the target of the thresholds.
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
    """Calibrate a model's cosines on image-text pairs.

    OUT maps a cosine to the probability that image and text match, and holds the thresholds below
    which the top result of a search, or of a list of labels, is rejected. The printed scores are of
    a calibration fitted on half of the images and measured on the other half; OUT is fitted on all.

    Parameters
    ----------
    data
        The pairs: KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar.
    out
        New .json file, for `cn-clip classify --calibration`.
    precision
        Target precision of the results at or above a threshold.
    kind
        logistic needs few pairs; isotonic fits any increasing curve and needs thousands.
    prior
        Fraction of matching pairs that the probability assumes.
    seed
        Seed of the split, and of sampled non-pairs and labels.
    report
        Write an HTML report with the reliability diagram to this .html file.
    model
        A name from `cn-clip models`, org/name on a hub, or the path of a checkpoint.
    device
        cpu, cuda, mps, or auto.
    model_precision
        float32, bfloat16, float16, or auto. A calibration holds for one of them.
    fast_decode
        Decode large JPEG files at reduced size; a calibration holds either with or without it.
    download_root
        Folder that official weights are read from and downloaded to.
    overwrite
        Replace an OUT that this command wrote.
    json
        Print JSON instead of a table.
    """
    from cn_clip.calibration import claim_calibration, write_calibration
    from cn_clip.data.sources.open import open_mix, paths_of
    from cn_clip.embedder import load
    from cn_clip.eval.calibration.fit import fit_calibration
    from cn_clip.eval.calibration.report import write_report
    from cn_clip.eval.dataset import eval_set_of
    from cn_clip.eval.embedded_dataset import embed_pairs
    from cn_clip.html.page import claim_page

    inputs = [*paths_of(data), *map(Path, model_paths(model))]
    claim_calibration(out, inputs=inputs, overwrite=overwrite)
    if report is not None:
        claim_page(report, "eval calibrate", inputs=inputs)
        check_different_paths(out, report)
    dataset = eval_set_of(open_mix([data]))
    embedder = load(
        model,
        device=device,
        precision=model_precision,
        fast_decode=fast_decode,
        download_root=download_root,
    )
    with progress_bar(_("embedding images")) as tick:
        embedded = embed_pairs(embedder, dataset, tick=tick)
    calibration, held_out = fit_calibration(
        embedded.images,
        embedded.texts,
        embedded.pairs,
        model=model,
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
    list_failed(embedded.failed)
    for use, threshold in calibration.thresholds.items():
        if threshold is None:
            print(
                _(
                    "cn-clip: warning: no threshold for {use} reaches a precision of "
                    "{precision:.0%}; give a lower --precision",
                    use=translate(use),
                    precision=precision,
                ),
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
                "held_out": _held_out_json(held_out),
                "failed": embedded.failed,
            }
        )
    else:
        _print(calibration, held_out, out)
    return 1 if embedded.failed else 0


def _held_out_json(held_out: HeldOut) -> dict[str, Any]:
    def scores(of: CalibrationScores) -> dict[str, Any]:
        bins = [{"mean": b.mean, "matching": b.matching, "pairs": b.pairs} for b in of.bins]
        return {"ece": of.ece, "brier": of.brier, "right": of.accuracy, "bins": bins}

    def effects(of: Mapping[str, ThresholdEffect]) -> dict[str, Any]:
        return {
            use: {
                "threshold": effect.threshold,
                "precision": effect.precision,
                "answered": effect.acceptance,
                "refused": effect.rejection,
            }
            for use, effect in of.items()
        }

    return {
        "calibrated": scores(held_out.calibrated),
        "fixed": scores(held_out.fixed),
        "answers": effects(held_out.effects),
        "fixed_answers": effects(held_out.fixed_effects),
    }


def _print(calibration: Calibration, held_out: HeldOut, out: str) -> None:
    from cn_clip.eval.calibration.fit import FIXED_CUTOFF

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in (
        N_("held-out half"),
        N_("calibrated"),
        _("cosine ≥ {cutoff}", cutoff=FIXED_CUTOFF),
    ):
        table.add_column(
            translate(column), justify="left" if column == "held-out half" else "right"
        )
    calibrated, fixed = held_out.calibrated, held_out.fixed
    table.add_row(_("expected calibration error"), f"{calibrated.ece:.3f}", f"{fixed.ece:.3f}")
    table.add_row(_("Brier score"), f"{calibrated.brier:.3f}", f"{fixed.brier:.3f}")
    table.add_row(_("accuracy"), f"{calibrated.accuracy:.1%}", f"{fixed.accuracy:.1%}")
    for use, effect in held_out.effects.items():
        fixed_effect = held_out.fixed_effects[use]
        for name, values in (
            (_("precision of accepted results"), (effect.precision, fixed_effect.precision)),
            (_("accepted if a match exists"), (effect.acceptance, fixed_effect.acceptance)),
            (_("rejected if none does"), (effect.rejection, fixed_effect.rejection)),
        ):
            cells = [_("none") if value is None else f"{value:.1%}" for value in values]
            table.add_row(f"{translate(use)}: {name}", *cells)
    counts = calibration.counts
    console().print(table)
    console().print(
        _(
            "{out}: {kind}, fitted on all {pairs:,} pairs of {images:,} images, for {model}",
            out=out,
            kind=calibration.kind,
            pairs=counts["pairs"],
            images=counts["images"],
            model=calibration.model,
        ),
        markup=False,
    )

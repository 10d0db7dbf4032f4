"""Calibrations on the 468 things, fitted on one half of the images and scored on the other.

    python benchmarks/calibration.py                       # fetches the stamps
    python benchmarks/calibration.py --stamps DIR --seeds 12
    python benchmarks/calibration.py --stamps DIR --pairs FOLDER   # only writes FOLDER/pairs.csv

The images are on white squares, as in things468.py. Each seed makes another split; the spread
of the rows is the uncertainty of one split. `cn-clip eval calibrate --data FOLDER/pairs.csv` fits
the same with seed 0.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np
from things468 import fetch, on_white, things

import cn_clip
from cn_clip.data.sources.open import open_mix
from cn_clip.eval.calibration.fit import fit_calibration
from cn_clip.eval.dataset import eval_set_of
from cn_clip.eval.embedded_dataset import embed_pairs


def write_pairs(stamps: Path, folder: Path) -> Path:
    """Write the images on white squares, and a CSV file of them with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "pairs.csv"
    with table.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "text"])
        for number, (path, caption) in enumerate(things(stamps)):
            on_white(path).save(folder / f"{number:03}.png")
            writer.writerow([f"{number:03}.png", caption])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; default: download them")
    parser.add_argument("--pairs", type=Path, help="write the pairs to this folder, and stop")
    parser.add_argument("--model", default="mini", help="anything that cn_clip.load takes")
    parser.add_argument("--seeds", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        stamps = options.stamps or fetch(Path(scratch))
        table = write_pairs(stamps, options.pairs or Path(scratch) / "pairs")
        if options.pairs:
            print(table)
            return
        embedder = cn_clip.load(options.model)
        pairs = embed_pairs(embedder, eval_set_of(open_mix([str(table)])))
    heads = ("ECE", "Brier", "accuracy", "fixed: ECE", "Brier", "accuracy", "labels", "fixed")
    print("kind      seed " + " ".join(f"{head:>10}" for head in heads))
    for kind in ("logistic", "isotonic"):
        rows = []
        for seed in range(options.seeds):
            _, held_out = fit_calibration(
                pairs.images, pairs.texts, pairs.pairs, model=embedder.name,
                fingerprint=embedder.fingerprint, data=pairs.digest, kind=kind, seed=seed,
            )  # fmt: skip
            row = [getattr(scores, name) for scores in (held_out.calibrated, held_out.fixed)
                   for name in ("ece", "brier", "accuracy")]  # fmt: skip
            row += [effects["labels"].precision or np.nan for effects in
                    (held_out.effects, held_out.fixed_effects)]  # fmt: skip
            rows.append(row)
            print(f"{kind:<9} {seed:>4} " + " ".join(f"{value:10.3f}" for value in row))
        for name, values in (("mean", np.mean(rows, 0)), ("most", np.max(rows, 0))):
            print(f"{kind:<9} {name} " + " ".join(f"{value:10.3f}" for value in values))


if __name__ == "__main__":
    main()

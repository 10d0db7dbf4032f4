"""Whether image features cached in float16 train as those in float32 do: 200 steps, step by step.

    python benchmarks/feature_precision.py --out DIR --stamps FOLDER [--steps 200]

The text tower of `mini` is trained by the recipe finetune-small on the 468 things of things468.py
(Debian's `tuxpaint-stamps-default`, unpacked by `dpkg -x`): with features in both precisions, and
again in float32 with the order of another seed, for a scale. The losses of each step are compared.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from finetune_small import stamps

from cn_clip.train.loop import train
from cn_clip.train.recipe.toml import build_recipe, read_recipe
from cn_clip.train.run.log import read_log

RUNS = {"fp32": ("fp32", 0), "fp16": ("fp16", 0), "fp32, another seed": ("fp32", 1)}


def losses(out: Path, pairs: Path, stored_as: str, seed: int, steps: int) -> np.ndarray:
    """Train, and return the loss of each step."""
    folder = out / f"{stored_as}-{seed}"
    values = read_recipe("finetune-small")
    (stage,) = values["stages"]
    del stage["epochs"]
    stage |= {"steps": steps, "features_stored_as": stored_as, "interpolate": 1.0}
    stage |= {"augment": False, "views": 1}
    values |= {"seed": seed, "data": {"train": [f"csv:{pairs}"], "workers": 0}}
    values["output"] = {"folder": str(folder), "log_every": 1, "stop_at_chance": 0}
    train(build_recipe(values), resume=True)
    return np.array([event["loss"] for event in read_log(folder) if event["kind"] == "step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"))
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    images = options.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    pairs = images / "pairs.csv"
    with pairs.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("image", "caption"), *stamps(options.stamps, images)])
    curves = {name: losses(options.out, pairs, *run, options.steps) for name, run in RUNS.items()}
    print(
        f"{'losses':<20} {'first':>8} {'last 20':>8} {'difference to fp32: mean':>25} {'most':>8}"
    )
    for name, curve in curves.items():
        difference = np.abs(curve - curves["fp32"])
        print(
            f"{name:<20} {curve[0]:8.4f} {curve[-20:].mean():8.4f} {difference.mean():25.5f}"
            f" {difference.max():8.5f}"
        )


if __name__ == "__main__":
    main()

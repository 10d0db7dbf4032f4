"""A training step of ViT-B/16 + RoBERTa-base beside the official model code and open_clip.

    python benchmarks/train.py [--peer OTHER/bin/python] [--batch 64] [--seconds 30]

Each row is a process of its own with the same batch: random pictures, and real Chinese captions
(those of the emoji of CLDR, if --captions names a text file, else the sentences of tests/golden).
The peer is a Python with the official `cn-clip` and `open_clip_torch`; rows that need it are left
out without one. Ours runs in both Pythons, so that the version of torch can be told from the code:
ratios are of rows of one Python. Stage 1 is the text tower alone learning (LiT): the reference's
way is online, padded to 52 tokens, float32; ours cached has the image features on disk. Weights
are random, which changes no time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESOLUTION = 224

# name -> (who runs it, stage 1, cached features, precision)
ROWS = {
    "stage 1, official, fp32": ("official", True, False, "fp32"),
    "stage 1, ours online, fp32": ("ours", True, False, "fp32"),
    "stage 1, ours cached, fp32": ("ours", True, True, "fp32"),
    "stage 1, ours online, bf16": ("ours", True, False, "bf16"),
    "stage 1, ours cached, bf16": ("ours", True, True, "bf16"),
    "full step, official, fp32": ("official", False, False, "fp32"),
    "full step, official, bf16": ("official", False, False, "bf16"),
    "full step, open_clip, fp32": ("open_clip", False, False, "fp32"),
    "full step, open_clip, bf16": ("open_clip", False, False, "bf16"),
    "full step, ours, fp32": ("ours", False, False, "fp32"),
    "full step, ours, bf16": ("ours", False, False, "bf16"),
}
# What is divided by what: (ours, the other's).
RATIOS = [
    ("stage 1, ours cached, fp32", "stage 1, ours online, fp32"),
    ("stage 1, ours cached, bf16", "stage 1, ours online, bf16"),
    ("stage 1, ours cached, fp32", "stage 1, official, fp32"),
    ("stage 1, ours cached, bf16", "stage 1, official, fp32"),
    ("full step, ours, bf16", "full step, official, fp32"),
    ("full step, ours, bf16", "full step, official, bf16"),
    ("full step, ours, fp32", "full step, official, fp32"),
    ("full step, ours, bf16", "full step, open_clip, bf16"),
    ("full step, ours, fp32", "full step, open_clip, fp32"),
]


def captions_of(path: str | None, count: int) -> list[str]:
    if path is not None:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    else:
        lines = json.loads((ROOT / "tests/golden/strings.json").read_text(encoding="utf-8"))
        lines = [line for line in lines if 2 <= len(line) <= 20]
    return [lines[n % len(lines)] for n in range(count)]


def official_step(batch: int, captions: list[str], locked: bool, precision: str):
    """The official model code with its optimizer's settings, as its train() does a step."""
    import torch

    from cn_clip.clip import tokenize
    from cn_clip.clip.utils import create_model

    model = create_model("ViT-B-16@RoBERTa-wwm-ext-base-chinese", None)
    model = model.float().train()
    if locked:
        for parameter in model.visual.parameters():
            parameter.requires_grad = False
    images, ids = torch.randn(batch, 3, RESOLUTION, RESOLUTION), tokenize(captions)
    return plain_step(model, lambda: model(images, ids), precision)


def open_clip_step(batch: int, captions: list[str], precision: str):
    """open_clip's own towers of these sizes: its ViT-B/16, and its text transformer of 12 layers of
    768, which reads 52 tokens as ours does."""
    import torch
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=12, width=768, patch_size=16, image_size=RESOLUTION)
    text = CLIPTextCfg(context_length=52, vocab_size=21128, width=768, heads=12, layers=12)
    model = CLIP(512, vision, text).train()
    images = torch.randn(batch, 3, RESOLUTION, RESOLUTION)
    ids = torch.randint(1, 21128, (batch, 52))
    return plain_step(model, lambda: model(images, ids)[:3], precision)


def plain_step(model, forward, precision: str):
    """A step as open_clip and the official code do it: forward, N x N cross-entropy, AdamW."""
    import torch
    import torch.nn.functional as F

    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, betas=(0.9, 0.98), eps=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            image, text, scale = forward()
            logits = scale * image @ text.T
            target = torch.arange(len(logits))
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        optimizer.step()

    return step


def our_step(batch: int, captions: list[str], locked: bool, cached: bool, precision: str):
    """A step of our trainer: its own functions, in its order."""
    import torch

    from cn_clip.config import MODELS
    from cn_clip.data.loading.loader import stack_keys, token_ids
    from cn_clip.data.sources.base import Row
    from cn_clip.model.clip import CLIP, initialize
    from cn_clip.train.batches.batch import LocalBatch
    from cn_clip.train.model.freeze import freeze, set_modes
    from cn_clip.train.optim import (
        clamp_logit_scale,
        make_optimizer,
        parameter_groups,
    )
    from cn_clip.train.recipe.schema import Stage
    from cn_clip.train.step import Heads, MixedPrecision, Towers, backward

    stage = Stage(epochs=1, freeze=("visual.*",) if locked else ())
    model = CLIP(MODELS["ViT-B-16"])
    initialize(model, torch.Generator().manual_seed(0))
    freeze(model, stage.freeze)
    set_modes(model)
    towers = Towers(model, Heads(stage, 512, None), stage)
    optimizer = make_optimizer(
        parameter_groups(model.named_parameters(), stage.optimizer), stage.optimizer
    )
    dtype = torch.bfloat16 if precision == "bf16" else None
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    mixed_precision = MixedPrecision(torch.device("cpu"), dtype, scaler)
    pixels = torch.randint(0, 256, (batch, 3, RESOLUTION, RESOLUTION)).to(torch.uint8)
    local_batch = LocalBatch(
        None if cached else pixels,
        torch.randn(batch, 512) if cached else None,
        token_ids(captions, 52),
        [Row(text, str(n), str(n)) for n, text in enumerate(captions)],
        stack_keys([[n, n, captions.index(text)] for n, text in enumerate(captions)]),
    )
    done = 0

    def step() -> None:
        nonlocal done
        backward(towers, local_batch, stage, mixed_precision, chunks=1, seed=(0, 0, done))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clamp_logit_scale(model)
        done += 1

    return step


def measure(name: str, batch: int, seconds: float, captions: list[str]) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    who, locked, cached, precision = ROWS[name]
    if who == "official":
        step = official_step(batch, captions, locked, precision)
    elif who == "open_clip":
        step = open_clip_step(batch, captions, precision)
    else:
        step = our_step(batch, captions, locked, cached, precision)
    step()  # memory is touched and kernels are chosen
    best, begin = float("inf"), time.perf_counter()
    while True:
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begin > seconds:
            break
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rate": batch / best, "memory": memory, "torch": torch.__version__}


def run_row(python: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    ours = ROWS[name][0] == "ours"
    command = [python, __file__, "--row", name, "--batch", str(options.batch)]
    command += ["--seconds", str(options.seconds)]
    if options.captions:
        command += ["--captions", options.captions]
    # PYTHONPATH for our rows only: the official package has the same name.
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src") if ours else ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="a Python with the official cn-clip and open_clip_torch")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="for each row, after a first step"
    )
    parser.add_argument("--captions", help="a text file, a caption a line")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        found = measure(
            options.row,
            options.batch,
            options.seconds,
            captions_of(options.captions, options.batch),
        )
        print(json.dumps(found))
        return
    captions = captions_of(options.captions, options.batch)
    python = options.peer or sys.executable
    mean = sum(map(len, captions)) / len(captions)
    print(f"batch {options.batch}, captions of {mean:.1f} characters, {os.cpu_count()} cores")
    rates: dict[str, float] = {}
    for name, (who, *_) in ROWS.items():
        if options.only not in name or (who != "ours" and options.peer is None):
            continue
        found = run_row(python, name, options)
        rates[name] = found["rate"]
        print(
            f"{name:32} {found['rate']:8.2f} pairs/s {found['memory']:8,.0f} MB at most, "
            f"torch {found['torch']}",
            flush=True,
        )
    for ours, other in RATIOS:
        if ours in rates and other in rates:
            print(f"{rates[ours] / rates[other]:6.2f} x  {ours}  /  {other}")


if __name__ == "__main__":
    main()

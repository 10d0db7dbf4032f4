"""A training step of ViT-B/16 + RoBERTa-base compared with the official code and open_clip.

    python benchmarks/train.py [--peer OTHER/bin/python] [--batch 64] [--seconds 30]

Each row runs in a separate process with the same batch: random images, and Chinese captions from
--captions, a text file, or from tests/golden. The peer is a Python with the official `cn-clip` and
`open_clip_torch`; without it, rows that need it are omitted. With it, all rows run in that Python,
so that ratios compare code under one version of torch. Stage 1 trains only the text tower (LiT):
the reference runs the image tower online, pads texts to 52 tokens and uses float32; "ours cached"
reads image features from memory. Weights are random, which does not affect the time.
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

# name -> (implementation, stage 1, cached features, precision)
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
# (ours, other): the ratios that are printed
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


def official_step(batch: int, captions: list[str], frozen: bool, precision: str):
    """Return a step of the official model code and optimizer settings."""
    import torch

    from cn_clip.clip import tokenize
    from cn_clip.clip.utils import create_model

    model = create_model("ViT-B-16@RoBERTa-wwm-ext-base-chinese", None)
    model = model.float().train()
    if frozen:
        for parameter in model.visual.parameters():
            parameter.requires_grad = False
    images, ids = torch.randn(batch, 3, RESOLUTION, RESOLUTION), tokenize(captions)
    return plain_step(model, lambda: model(images, ids), precision)


def open_clip_step(batch: int, captions: list[str], precision: str):
    """Return a step of open_clip: its ViT-B/16, and a text transformer of the same depth, width and
    context length as ours."""
    import torch
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=12, width=768, patch_size=16, image_size=RESOLUTION)
    text = CLIPTextCfg(context_length=52, vocab_size=21128, width=768, heads=12, layers=12)
    model = CLIP(512, vision, text).train()
    images = torch.randn(batch, 3, RESOLUTION, RESOLUTION)
    ids = torch.randint(1, 21128, (batch, 52))
    return plain_step(model, lambda: model(images, ids)[:3], precision)


def plain_step(model, forward, precision: str):
    """Return a step with the usual N x N cross-entropy and AdamW."""
    import torch
    import torch.nn.functional as F

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, betas=(0.9, 0.98), eps=1e-6)

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


def our_step(batch: int, captions: list[str], frozen: bool, cached: bool, precision: str):
    """Return a step made of the functions of our training loop."""
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

    stage = Stage(epochs=1, freeze=("visual.*",) if frozen else ())
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
    implementation, frozen, cached, precision = ROWS[name]
    if implementation == "official":
        step = official_step(batch, captions, frozen, precision)
    elif implementation == "open_clip":
        step = open_clip_step(batch, captions, precision)
    else:
        step = our_step(batch, captions, frozen, cached, precision)
    step()  # warm-up: memory is allocated and kernels are chosen
    best, begin = float("inf"), time.perf_counter()
    while True:
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begin > seconds:
            break
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"pairs_per_second": batch / best, "memory": memory, "torch": torch.__version__}


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
        "--seconds", type=float, default=30.0, help="per row, after the warm-up step"
    )
    parser.add_argument("--captions", help="a text file with one caption per line")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        result = measure(
            options.row,
            options.batch,
            options.seconds,
            captions_of(options.captions, options.batch),
        )
        print(json.dumps(result))
        return
    captions = captions_of(options.captions, options.batch)
    python = options.peer or sys.executable
    mean = sum(map(len, captions)) / len(captions)
    print(f"batch {options.batch}, captions of {mean:.1f} characters, {os.cpu_count()} cores")
    speeds: dict[str, float] = {}
    for name, (implementation, *_) in ROWS.items():
        if options.only not in name or (implementation != "ours" and options.peer is None):
            continue
        result = run_row(python, name, options)
        speeds[name] = result["pairs_per_second"]
        print(
            f"{name:32} {speeds[name]:8.2f} pairs/s {result['memory']:8,.0f} MB peak, "
            f"torch {result['torch']}",
            flush=True,
        )
    for ours, other in RATIOS:
        if ours in speeds and other in speeds:
            print(f"{speeds[ours] / speeds[other]:6.2f} x  {ours}  /  {other}")


if __name__ == "__main__":
    main()

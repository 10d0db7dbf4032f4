"""Time and peak memory of our loss and of the N x N loss of open_clip, on the CPU.

    python benchmarks/loss.py [--batch 16384] [--dim 512] [--rounds 3] [--json FILE]

The N x N loss is ``logits = scale * image @ text.T`` and two ``F.cross_entropy``, forward and
backward. Measurements run alternately in separate processes; the best time and the highest peak
count. Peak memory excludes what the process used before the loss, such as the inputs. Both get the
same seeded embeddings, and their losses and gradients are compared. Ratios are ours / N x N; below
1 they are in our favour. On a shared machine, compare CPU seconds (of all threads).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cn_clip.train.loss import Teacher, clip_loss, sigmoid_loss

MEGABYTE = 2**20
NAIVE = "N x N"
# name -> limits of the time and memory ratios to N x N; None if there is nothing to compare with
OURS: dict[str, tuple[float, float] | None] = {
    "ours": (1.3, 1 / 8),
    "ours, keys without duplicates": None,
    "ours, each caption five times": None,
    "ours, teacher": None,
    "ours, sigmoid": None,
}


def naive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.T
    labels = torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def loss_of(which: str, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    if which == NAIVE:
        return naive(image, text, scale)
    if which == "ours":
        return clip_loss(image, text, scale)
    if which == "ours, sigmoid":
        return sigmoid_loss(image, text, scale, torch.tensor(-10.0))
    if which == "ours, teacher":
        theirs = [x.detach().roll(1, 0) for x in (image, text)]
        return clip_loss(image, text, scale, teacher=Teacher(*theirs, logit_scale=50, weight=0.5))
    keys = torch.arange(3 * len(image)).reshape(-1, 3)
    if "five" in which:
        keys[:, 0] = torch.arange(len(image)) // 5
    return clip_loss(image, text, scale, keys=keys)


def measure(which: str, batch: int, dim: int) -> dict[str, float]:
    rng = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(batch, dim, generator=rng), dim=-1)
    text = F.normalize(image + 2 * torch.randn(batch, dim, generator=rng) / dim**0.5, dim=-1)
    inputs = [x.requires_grad_() for x in (image, text, torch.tensor(50.0))]
    small = [x.detach()[:64] if x.dim() else x for x in inputs]
    loss_of(which, *(x.requires_grad_() for x in small)).backward()  # warm-up
    before = peak_memory()
    start, busy = time.perf_counter(), time.process_time()
    value = loss_of(which, *inputs)
    value.backward()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = peak_memory() - before
    gradients = {f"|gradient {i}|": float(x.grad.norm()) for i, x in enumerate(inputs)}
    return {"seconds": seconds, "cpu": busy, "peak": peak, "loss": value.item(), **gradients}


def peak_memory() -> float:
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.batch, options.dim)))
        return
    results: dict[str, list[dict[str, float]]] = {NAIVE: [], **{which: [] for which in OURS}}
    for _ in range(options.rounds):
        for which, runs in results.items():
            size = ["--batch", str(options.batch), "--dim", str(options.dim)]
            command = [sys.executable, __file__, "--child", which, *size]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout))
    figures = {
        which: {
            **runs[0],
            "seconds": min(run["seconds"] for run in runs),
            "cpu": min(run["cpu"] for run in runs),
            "peak": max(run["peak"] for run in runs),
        }
        for which, runs in results.items()
    }
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{options.batch} pairs, {options.dim} dimensions; {machine}")
    theirs = figures[NAIVE]
    print(f"{'':32}{'s':>8}{'ratio':>8}{'CPU s':>8}{'ratio':>8}{'MB':>8}{'ratio':>8}  limits")
    for which, figure in figures.items():
        limits = OURS.get(which)
        print(
            f"{which:32}{figure['seconds']:8.2f}{figure['seconds'] / theirs['seconds']:8.2f}"
            f"{figure['cpu']:8.2f}{figure['cpu'] / theirs['cpu']:8.2f}"
            f"{figure['peak'] / MEGABYTE:8.0f}{figure['peak'] / theirs['peak']:8.3f}"
            + (f"  time {limits[0]:.2f}, memory {limits[1]:.3f}" if limits else "")
        )
    for name in [name for name in theirs if name not in ("seconds", "cpu", "peak")]:
        print(f"{name}: {theirs[name]:.7g} of N x N, {figures['ours'][name]:.7g} of ours")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

"""A long run under torchrun whose processes are killed at random, beside one that is left alone.

    python benchmarks/long_run.py --folder SCRATCH [--steps 20000] [--save-every 200] [--kills 20]

A tiny model trains in two processes over gloo. At random moments a process gets SIGKILL. torchrun
starts all of them again with the same command, ``cn-clip train --resume auto``, which goes on from
the last state. States are written in the background. Both runs should have the same losses and
weights, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import tomli_w

PAIRS, SIDE, BATCH, PROCESSES = 400, 32, 8, 2


def write_inputs(folder: Path) -> None:
    """Write pairs and the initial weights of a tiny model."""
    import numpy as np
    import torch
    from PIL import Image

    from cn_clip import weights
    from cn_clip.config import ModelConfig, TextConfig, VisionConfig
    from cn_clip.model.clip import CLIP, initialize

    rng = np.random.default_rng(0)
    rows = []
    for number in range(PAIRS):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        text = "".join(chr(0x4E00 + int(c)) for c in rng.integers(0, 5000, 4))
        rows.append({"image": f"{number}.png", "text": text})
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "pairs.jsonl").write_text(lines + "\n", "utf-8")
    text_tower = TextConfig(
        vocab_size=21128, hidden_size=32, layers=1, heads=2, intermediate_size=64
    )
    model = CLIP(ModelConfig("tiny", 32, VisionConfig("vit", SIDE, 64, (1,), 16), text_tower))
    initialize(model, torch.Generator().manual_seed(0))
    weights.save_folder(model, folder / "start")


def recipe_of(folder: Path, run: Path, options: argparse.Namespace) -> Path:
    """Write the recipe of a run."""
    values = {
        "data": {"train": [f"jsonl:{folder / 'pairs.jsonl'}"], "workers": 0},
        "start": {"checkpoint": str(folder / "start")},
        "machine": {"precision": "fp32", "device": "cpu"},
        "output": {
            "folder": str(run),
            "log_every": 1,
            "save_every": options.save_every,
            "background_saves": True,
            "stop_at_chance": 0,
        },
        "stages": [{"name": "all", "steps": options.steps, "global_batch_size": BATCH}],
    }
    path = run.with_suffix(".toml")
    path.write_text(tomli_w.dumps(values), "utf-8")
    return path


def train(recipe: Path, run: Path, steps: int, kills: int) -> tuple[int, float]:
    """Train with kills at random moments; return how many there were, and the seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={PROCESSES}", f"--max-restarts={kills}"]
    command += ["-m", "cn_clip", "train", "--recipe", str(recipe), "--resume", "auto"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    start = time.monotonic()
    with open(run.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    done = 0
    rng = random.Random(0)
    moments = sorted(rng.uniform(0.02, 0.95) * steps for _number in range(kills))
    for moment in moments:
        while process.poll() is None and steps_of(run) < moment:
            time.sleep(0.05)
        if process.poll() is not None:
            break
        time.sleep(rng.uniform(0, 0.5))
        children = processes_of(process.pid)
        if children:
            os.kill(rng.choice(children), signal.SIGKILL)
            done += 1
            time.sleep(1)
    if process.wait() != 0:
        raise SystemExit(f"the run failed; see {run.with_suffix('.log')}")
    return done, time.monotonic() - start


def processes_of(launcher: int) -> list[int]:
    """Return the training processes of a launcher."""
    text = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    return [
        pid
        for pid in map(int, text.split())
        if b"cn_clip" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def steps_of(run: Path) -> int:
    """Return the last step in the log of a run."""
    try:
        with open(run / "log.jsonl", "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 4096))
            lines = stream.read().splitlines()
        return max((json.loads(line).get("total", 0) for line in lines[1:]), default=0)
    except (OSError, ValueError):
        return 0


def losses_of(run: Path) -> dict[int, float]:
    from cn_clip.train.run.log import read_log

    return {event["total"]: event["loss"] for event in read_log(run) if event["kind"] == "step"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_inputs(folder)
    found = {}
    for name, kills in (("whole", 0), ("killed", options.kills)):
        run = folder / name
        recipe = recipe_of(folder, run, options)
        done, seconds = train(recipe, run, options.steps, kills)
        found[name] = losses_of(run)
        print(f"{name}: {len(found[name]):,} steps, {done} kills, {seconds:,.0f} s", flush=True)
    equal = sum(found["whole"].get(step) == loss for step, loss in found["killed"].items())
    print(f"equal losses: {equal:,} of {options.steps:,}")
    weights = [(folder / name / "final" / "model.safetensors").read_bytes() for name in found]
    print("equal weights:", weights[0] == weights[1])


if __name__ == "__main__":
    main()

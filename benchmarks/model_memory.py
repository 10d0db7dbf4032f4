"""Memory that each model needs: to load, to embed, and to train at batches of 32 and 128.

    python benchmarks/model_memory.py [--measure mini RN50 ViT-B-16] [--only ViT-B-16]

Training is computed: a step in bfloat16 with AdamW runs on tensors without contents (torch's
FakeTensorMode), and the peak of what they would hold is counted (MemTracker). With --measure,
models with random weights are loaded and embed on this machine, and the growth of the peak
memory is printed; the same for a training step shows how far the computation is off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

NAMES = ("mini", "RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14")
TOKENS = 52
GB = 1e9


def config_of(name: str) -> Any:
    from cn_clip import hub, weights
    from cn_clip.config import MODELS

    return weights.read_config(hub.EMBEDDED_FOLDER) if name == "mini" else MODELS[name]


def step(model: Any, pixels: Any, ids: Any, optimizer: Any) -> None:
    """One training step of both towers, as ``train/step.py`` makes it."""
    import torch
    from torch.nn import functional as F

    with torch.autocast("cpu", torch.bfloat16):
        image = F.normalize(model.encode_image(pixels).float(), dim=-1)
        hidden, _ = model.bert(ids, attention_mask=None)
        text = F.normalize((hidden[:, 0] @ model.text_projection).float(), dim=-1)
    logits = model.logit_scale.exp() * image @ text.T
    labels = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def inputs(config: Any, batch: int) -> tuple[Any, Any]:
    import torch

    side = config.vision.resolution
    return torch.rand(batch, 3, side, side), torch.randint(1, 1000, (batch, TOKENS))


def training_gb(name: str, batch: int, checkpointing: bool) -> float:
    """Return the computed peak of a training step, in GB."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    from cn_clip.model.clip import CLIP

    config = config_of(name)
    with FakeTensorMode():
        model = CLIP(config).train()
        model.set_grad_checkpointing(checkpointing)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):  # the optimizer has its state from the second step on
                step(model, *inputs(config, batch), optimizer)
        peak = tracker.get_tracker_snapshot("peak")
    return sum(sizes["Total"] for sizes in peak.values()) / GB


def peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure_one(name: str, what: str, folder: str) -> None:
    """Print the growth of this process's peak memory, in MB, over that of importing torch."""
    import torch

    import cn_clip
    from cn_clip import weights
    from cn_clip.model.clip import CLIP, initialize

    if what == "save":
        model = CLIP(config_of(name))
        initialize(model, torch.Generator().manual_seed(0))
        weights.save_folder(model.eval(), Path(folder) / name)
        return
    torch.ones(256, 256) @ torch.ones(256, 256)
    before = peak_mb()
    if what == "train":
        model = CLIP(config_of(name))
        initialize(model, torch.Generator().manual_seed(0))
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        for _ in range(2):
            step(model, *inputs(model.config, 32), optimizer)
    else:
        embedder = cn_clip.load(name if name == "mini" else f"{folder}/{name}", device="cpu")
        if what == "embed":
            embedder.embed_images(torch.rand(32, 224, 224, 3).numpy())
            embedder.embed_texts(["一只坐在窗边晒太阳的猫"] * 32)
    print(json.dumps(peak_mb() - before))


def measured(name: str, what: str, folder: str) -> float | None:
    command = [sys.executable, __file__, "--one", name, what, folder]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out) / 1e3 if out else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--measure", nargs="*", default=(), choices=NAMES)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        measure_one(*given.one)
        return
    import torch

    from cn_clip.model.clip import CLIP

    print(f"torch {torch.__version__}, {os.cpu_count()} CPUs; computed, GB of 10^9 bytes:")
    print("model, parameters in M, weights in float32: a step of 32 / 128; with checkpointing")
    for name in given.only:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in CLIP(config_of(name)).parameters())
        steps = [training_gb(name, batch, way) for way in (False, True) for batch in (32, 128)]
        row = " ".join(f"{peak:6.1f}" for peak in steps)
        print(f"{name:14} {parameters / 1e6:6.1f} {4 * parameters / GB:6.2f}: {row}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in given.measure:
            if name != "mini":
                measured(name, "save", folder)
            parts = [f"{what} {measured(name, what, folder):.2f}" for what in ("load", "embed")]
            if name != "mini":
                parts.append(f"train at 32 {measured(name, 'train', folder):.2f}")
            print(f"measured, GB over torch: {name}: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()

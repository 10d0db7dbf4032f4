"""Memory that each model needs: to load, to embed, and to train at batches of 32 and 128.

    python benchmarks/model_memory.py [--measure mini RN50 ViT-B-16] [--only ViT-B-16]

Training is computed: the forward pass of both towers in bfloat16, 52 tokens a text, runs on
tensors without contents (torch's FakeTensorMode), and what it saves for the backward pass is
counted; weights, gradients and AdamW's averages are 16 bytes per parameter. With --measure, models
with random weights are loaded and embed on this machine, and the growth of the peak memory is
printed; the same for a training step shows how far the computation is off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
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


@dataclass
class Saved:
    """Bytes that the forward pass saves for the backward pass."""

    total: int = 0
    of_blocks: list[int] = field(default_factory=list)
    block_inputs: int = 0


def saved_for_backward(name: str, batch: int) -> Saved:
    """Run a forward pass on tensors without contents, and count what it saves."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from cn_clip.model.clip import CLIP

    config, saved, seen = config_of(name), Saved(), set()
    current: list[int] = []  # the block that runs
    with FakeTensorMode():
        model = CLIP(config).train()
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def pack(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in own and storage._cdata not in seen:
                seen.add(storage._cdata)
                kept.append(tensor)  # so that no other storage gets its address
                saved.total += storage.nbytes()
                if current:
                    saved.of_blocks[current[-1]] += storage.nbytes()
            return tensor

        def enter(module: Any, inputs: Any) -> None:
            saved.of_blocks.append(0)
            current.append(len(saved.of_blocks) - 1)
            saved.block_inputs += inputs[0].untyped_storage().nbytes()

        kept: list[Any] = []
        blocks = [*getattr(getattr(model.visual, "transformer", None), "resblocks", [])]
        for block in [*blocks, *model.bert.encoder.layer]:
            block.register_forward_pre_hook(enter)
            block.register_forward_hook(lambda *_: current.clear())
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            pixels, ids = inputs(config, batch)
            model.encode_image(pixels)
            model.bert(ids, attention_mask=None)
    return saved


def training_gb(name: str, batch: int, parameters: int) -> tuple[float, float]:
    """Return the computed peak of a training step in GB: without and with checkpointing.

    Weights, gradients and two averages of AdamW are in float32. With checkpointing, the inputs of
    the blocks are kept, and one block is recomputed at a time.
    """
    saved, state = saved_for_backward(name, batch), 16 * parameters
    kept = saved.total - sum(saved.of_blocks) + saved.block_inputs + max(saved.of_blocks)
    return (state + saved.total) / GB, (state + kept) / GB


def peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


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
        steps = [training_gb(name, batch, parameters) for batch in (32, 128)]
        row = " ".join(f"{peak:6.1f}" for way in (0, 1) for peak in (step[way] for step in steps))
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

"""Where the torch backend spends its time on images, and what the usual remedies bring.

    python benchmarks/torch_images.py [--model ViT-B-16] [--rounds 5] [--peer OTHER/bin/python]

Random initial weights, batch 8, float32, this CPU. First the share of each kind of operation, from
torch's profiler, and of the matrix products' own floor: the time they would take at the rate of a
plain product of the model's sizes. Then each remedy, interleaved, medians:

- `as loaded`: the backend as `cn_clip.load` returns it
- `copied`: parameters in memory of their own, in pages of 4 KB
- `huge pages`: parameters in one buffer of 2 MB pages
- `channels last`: the patch embedding's memory layout
- `patches by product`: the patch embedding as one matrix product
- `compiled`, `compiled, frozen`: torch.compile; frozen weights are packed once for oneDNN

The peer is a Python with the official `cn-clip` 1.6.0.
"""

from __future__ import annotations

import argparse
import copy
import json
import mmap
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 8
KINDS = {
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "patch embedding": ("aten::mkldnn_convolution", "aten::_slow_conv2d_forward"),
    "LayerNorm": ("aten::native_layer_norm",),
    "QuickGELU and sums": ("aten::sigmoid_", "aten::mul_", "aten::mul", "aten::add", "aten::add_"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone"),
}

OFFICIAL = """
import sys, time
import numpy as np, torch
import cn_clip.clip as clip
torch.set_grad_enabled(False)
model, _ = clip.load_from_name(sys.argv[2], device="cpu", download_root=sys.argv[1])
model.eval()
pixels = torch.from_numpy(np.load(sys.argv[1] + "/pixels.npy"))
model.encode_image(pixels)
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    model.encode_image(pixels)
    print(time.perf_counter() - start, flush=True)
"""


def prepare(folder: Path, name: str) -> Path:
    """Write a checkpoint of random weights and pixels; return the checkpoint."""
    import torch

    from cn_clip import weights
    from cn_clip.config import MODELS
    from cn_clip.model.clip import CLIP, initialize

    config = MODELS[name]
    model = CLIP(config)
    initialize(model, torch.Generator().manual_seed(0))
    checkpoint = folder / f"clip_cn_{name.lower()}.pt"
    weights.save_official(model, checkpoint)
    size = config.vision.resolution
    pixels = np.random.default_rng(0).standard_normal((BATCH, 3, size, size))
    np.save(folder / "pixels.npy", pixels.astype(np.float32))
    return checkpoint


def remedies(model: Any, pixels: Any, only: list[str]) -> dict[str, Callable[[], Any]]:
    """Return a call of each remedy, or of ``only`` some, each with an image tower of its own."""
    import torch
    import torch._inductor.config as inductor

    def changed(change: Callable[[Any], Any]) -> Callable[[], Any]:
        tower = change(copy.deepcopy(model.visual))
        return lambda: tower(pixels)

    def compiled(frozen: bool) -> Callable[[], Any]:
        tower = torch.compile(copy.deepcopy(model.visual))
        with inductor.patch(freezing=frozen):
            tower(pixels)  # compiles
        return lambda: tower(pixels)

    made: dict[str, Callable[[], Callable[[], Any]]] = {
        "as loaded": lambda: lambda: model.visual(pixels),
        "copied": lambda: changed(lambda tower: tower),
        "huge pages": lambda: changed(in_huge_pages),
        "channels last": lambda: changed(lambda t: t.to(memory_format=torch.channels_last)),
        "patches by product": lambda: changed(patches_by_product),
        "compiled": lambda: compiled(frozen=False),
        "compiled, frozen": lambda: compiled(frozen=True),
    }
    return {name: make() for name, make in made.items() if not only or name in only}


def in_huge_pages(tower: Any) -> Any:
    import torch

    size = sum(-(-p.nbytes // 64) * 64 for p in tower.parameters())
    buffer = mmap.mmap(-1, size)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    whole, offset = torch.frombuffer(buffer, dtype=torch.uint8), 0
    for parameter in tower.parameters():
        place = whole[offset : offset + parameter.nbytes].view(parameter.dtype)
        place = place.view(parameter.shape)
        place.copy_(parameter.data)
        parameter.data = place
        offset += -(-parameter.nbytes // 64) * 64
    return tower


def patches_by_product(tower: Any) -> Any:
    import torch

    weight, size = tower.conv1.weight.flatten(1), tower.conv1.kernel_size[0]

    class Product(torch.nn.Module):
        def forward(self, images: Any) -> Any:
            batch, channels, side, _ = images.shape
            grid = side // size
            cut = images.view(batch, channels, grid, size, grid, size)
            rows = cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid * grid, -1)
            return (rows @ weight.t()).transpose(1, 2).unflatten(2, (grid, grid))

    tower.conv1 = Product()
    return tower


def profile(run: Callable[[], Any]) -> dict[str, float]:
    """Return the seconds of each kind of operation in one call."""
    from torch.profiler import ProfilerActivity, profile

    calls = 5
    run()
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        for _ in range(calls):
            run()
    seconds: Counter[str] = Counter()
    for event in measured.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key in names), "all others")
        seconds[kind] += event.self_cpu_time_total / 1e6 / calls
    return dict(seconds)


def median_seconds(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(call())
    return {name: statistics.median(values) for name, values in times.items()}


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    def call() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return call


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", default="")
    parser.add_argument("--only", nargs="+", default=[], help="only these remedies")
    options = parser.parse_args()
    import torch

    import cn_clip
    from cn_clip.bench.floor import measure_floors
    from cn_clip.bench.operations import image_operations
    from cn_clip.config import MODELS

    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = prepare(folder, options.model)
        pixels = torch.from_numpy(np.load(folder / "pixels.npy"))
        model = cn_clip.load(checkpoint, device="cpu", precision="float32").backend.model
        seconds = profile(lambda: model.visual(pixels))
        floor = next(f for f in measure_floors(MODELS[options.model]) if f.precision == "float32")
        operations = BATCH * (image_operations(MODELS[options.model]) or float("nan"))
        least, whole = operations / floor.gflops / 1e9, sum(seconds.values())
        for kind, value in sorted(seconds.items(), key=lambda item: -item[1]):
            print(f"{kind:20} {value * 1000:8.1f} ms {100 * value / whole:5.1f} %")
        print(f"{'whole':20} {whole * 1000:8.1f} ms; at the floor of {floor.gflops:.0f} GFLOP/s")
        print(f"{'':20} {least * 1000:8.1f} ms {100 * least / whole:5.1f} %")

        runs = remedies(model, pixels, options.only)
        reference = model.visual(pixels)
        calls = {name: timed(run) for name, run in runs.items()}
        if options.peer:
            process = subprocess.Popen(
                [options.peer, "-E", "-c", OFFICIAL, str(folder), options.model],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            assert process.stdin and process.stdout
            while process.stdout.readline() not in ("ready\n", ""):
                pass

            def official() -> float:
                print(file=process.stdin, flush=True)
                return float(process.stdout.readline())  # type: ignore[union-attr]

            calls = {"official 1.6.0": official} | calls
        medians = median_seconds(calls, options.rounds)
        first = next(iter(medians))
        for name, value in medians.items():
            ratio = medians[first] / value
            line = f"{name:20} {BATCH / value:6.2f} images/s  {ratio:5.2f} x"
            if name in runs:
                line += f"  largest difference {(runs[name]() - reference).abs().max():.1e}"
            print(line)
        print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}))
        if options.peer:
            process.stdin.close()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())

"""What a CUDA device reaches: inference, a training step, processes, losses, top-k.

    python benchmarks/gpu.py [--dry-run] [--part NAME ...]

Every part runs in a process of its own with a time limit, so that one that fails does not stop the
others; the exit code is 1 if any fails. open_clip and timm are measured beside ours if they are
installed. --dry-run runs every part with tiny models on the CPU, which shows only that the script
works.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

LIMITS = {"inference": 100, "step": 150, "processes": 140, "losses": 60, "topk": 30}  # seconds
PROCESS_LIMIT = 60  # seconds, of each run in "processes"
LOSS_STEPS = 20


def config_of(dry: bool) -> Any:
    from cn_clip.config import MODELS, ModelConfig, TextConfig, VisionConfig

    if not dry:
        return MODELS["ViT-B-16"]
    text = TextConfig(hidden_size=64, layers=2, heads=1, intermediate_size=128)
    return ModelConfig("tiny", 32, VisionConfig("vit", 32, 64, (2,), 8), text)


def model_of(config: Any, device: str) -> Any:
    import torch

    from cn_clip.model.clip import CLIP, initialize

    model = CLIP(config)
    initialize(model, torch.Generator().manual_seed(0))
    return model.to(device)


def inference(device: str, dry: bool) -> dict[str, Any]:
    """Images and texts per second in float16, at the best batch."""
    import torch

    from cn_clip.backends.torch import TorchBackend
    from cn_clip.bench.operations import image_operations, text_operations

    config = config_of(dry)
    dtype = torch.bfloat16 if dry else torch.float16
    model = model_of(config, device).to(dtype).eval().requires_grad_(False)
    backend, size = TorchBackend(model), config.vision.resolution
    result: dict[str, Any] = {}
    images: dict[str, Callable[[Any], object]] = {"ours": model.encode_image}
    images["ours, compiled"] = torch.compile(model.encode_image, backend=compiler(dry))
    images |= peers(size, dtype, device, dry)
    for name, encode in images.items():
        try:
            rates = {
                batch: batch / best_seconds(lambda: encode(pixels), device)  # noqa: B023
                for batch in ((2, 4) if dry else (64, 256, 512))
                if (pixels := torch.randn(batch, 3, size, size, device=device, dtype=dtype))
                is not None
            }
            result[f"{name}, images/s"] = max(rates.values())
            result[f"{name}, batch"] = max(rates, key=lambda batch: rates[batch])
        except Exception as error:
            result[name] = f"failed: {error!r:.200}"
    uint8 = torch.randint(0, 256, (2 if dry else 256, 3, size, size), dtype=torch.uint8).numpy()
    seconds = best_seconds(lambda: backend.run_images(uint8), device)
    result["ours, from uint8 in host memory, images/s"] = len(uint8) / seconds
    ids = torch.randint(1, 1000, (4 if dry else 1024, 12), device=device)
    result["ours, texts of 12 tokens/s"] = len(ids) / best_seconds(
        lambda: model.encode_text(ids), device
    )
    best = max(v for k, v in result.items() if k.startswith("ours") and k.endswith("images/s"))
    result["TFLOP/s, images"] = best * (image_operations(config) or 0) / 1e12
    texts = result["ours, texts of 12 tokens/s"]
    result["TFLOP/s, texts"] = texts * text_operations(config, 12) / 1e12
    result["TFLOP/s, matrix product"] = product_tflops(dtype, device, dry)
    return result


def compiler(dry: bool) -> str:
    """Return the backend of torch.compile; a dry run only traces, which needs no C++ compiler."""
    return "eager" if dry else "inductor"


def peers(size: int, dtype: Any, device: str, dry: bool) -> dict[str, Callable[[Any], object]]:
    """Return the image towers of timm and open_clip of the same size, if they are installed."""
    found: dict[str, Callable[[Any], object]] = {}
    if dry:
        return found
    try:
        import timm

        tower = timm.create_model("vit_base_patch16_clip_224", num_classes=512)
        found["timm"] = tower.to(device, dtype).eval()
    except ImportError:
        pass
    try:
        import open_clip

        clip = open_clip.create_model("ViT-B-16").to(device, dtype).eval()
        found["open_clip"] = clip.encode_image
    except ImportError:
        pass
    return found


def product_tflops(dtype: Any, device: str, dry: bool) -> float:
    import torch

    n = 256 if dry else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / best_seconds(lambda: a @ b, device) / 1e12


def step(device: str, dry: bool) -> dict[str, Any]:
    """Pairs per second of a training step in bf16, at the largest batch that fits."""
    import torch

    result: dict[str, Any] = {}
    for compiled in (False, True):
        name = "compiled" if compiled else "eager"
        for batch in (8, 4) if dry else (1024, 512, 256, 128):
            try:
                run = training_step(device, dry, batch, compiled)
                result[f"{name}, pairs/s"] = batch / best_seconds(run, device)
                result[f"{name}, batch"] = batch
                break
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        else:
            result[name] = "failed: no batch fits"
    result["TFLOP/s, matrix product"] = product_tflops(torch.bfloat16, device, dry)
    return result


def training_step(
    device: str,
    dry: bool,
    batch: int,
    compiled: bool = False,
    precision: str = "bf16",
    sharded: bool = False,
) -> Callable[[], float]:
    """Return a full step of our training code that returns its loss."""
    import torch

    from cn_clip.data.loading.loader import stack_keys
    from cn_clip.data.sources.base import Row
    from cn_clip.train.batches.batch import LocalBatch
    from cn_clip.train.model.freeze import set_modes
    from cn_clip.train.optim import clamp_logit_scale, make_optimizer, parameter_groups
    from cn_clip.train.recipe.schema import Stage
    from cn_clip.train.step import Heads, MixedPrecision, Towers, backward

    stage, config = Stage(epochs=1), config_of(dry)
    model = model_of(config, device)
    set_modes(model)
    model.bert.eval()  # no dropout: the losses of two devices are compared
    if sharded:
        shard_alone(model)
    if compiled:
        model.visual.compile(backend=compiler(dry))
        model.bert.compile(backend=compiler(dry))
    towers = Towers(model, Heads(stage, config.embed_dim, None), stage)
    optimizer = make_optimizer(
        parameter_groups(model.named_parameters(), stage.optimizer), stage.optimizer
    )
    scaler = torch.amp.GradScaler(device, enabled=False)
    dtype = torch.bfloat16 if precision == "bf16" else None
    mixed = MixedPrecision(torch.device(device), dtype, scaler)
    generator, size = torch.Generator().manual_seed(0), config.vision.resolution
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    ids = torch.randint(1, 1000, (batch, 20), generator=generator)
    rows = [Row(str(n), str(n), str(n)) for n in range(batch)]
    keys = stack_keys([[n, n, n] for n in range(batch)])
    local = LocalBatch(pixels, None, ids, rows, keys)
    done = 0

    def run() -> float:
        nonlocal done
        loss = backward(towers, local, stage, mixed, chunks=1, seed=(0, 0, done))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clamp_logit_scale(model)
        done += 1
        return float(loss)

    return run


def losses(device: str, dry: bool) -> dict[str, Any]:
    """Largest difference between the losses of 20 steps in float32 on this device and the CPU."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    here = training_step(device, True, 16, precision="fp32")
    cpu = training_step("cpu", True, 16, precision="fp32")
    pairs = [(here(), cpu()) for _ in range(LOSS_STEPS)]
    return {
        "largest relative difference": max(abs(a - b) / abs(b) for a, b in pairs),
        "first and last loss": [pairs[0][0], pairs[-1][0]],
    }


def processes(device: str, dry: bool) -> dict[str, Any]:
    """A short run of the trainer by torchrun, and steps with FSDP2; one process each.

    The trainer leaves DDP out with one process, and refuses FSDP2: ``fsdp`` has steps of its own.
    """
    import numpy as np
    from PIL import Image

    from cn_clip import weights

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        weights.save_folder(model_of(config_of(True), "cpu"), root / "model")
        (root / "pairs").mkdir()
        rng = np.random.default_rng(0)
        for n in range(32):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "pairs" / f"{n}.jpg")
            (root / "pairs" / f"{n}.txt").write_text(f"第{n}张图片", encoding="utf-8")
        train = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        train += ["--nproc-per-node", "1", "-m", "cn_clip", "train", "--recipe", "finetune-muge"]
        train += ["--checkpoint", str(root / "model"), "--train-data", f"folder:{root}/pairs"]
        train += ["--output.folder", str(root / "run"), "--parallel", "ddp"]
        train += ["--epochs", "1", "--global-batch-size", "8", "--warmup", "0"]
        train += ["--device", device] if device == "cpu" else []
        shard = [sys.executable, __file__, "--here", "fsdp", *(["--dry-run"] if dry else [])]
        return {"ddp, trainer": outcome(train), "fsdp, steps": outcome(shard)}


def outcome(command: list[str]) -> str:
    """Run a command; return the seconds it took, or why it failed."""
    start = time.perf_counter()
    try:
        done = run_limited(command, PROCESS_LIMIT)
    except subprocess.TimeoutExpired:
        return f"failed: stopped after {PROCESS_LIMIT} s"
    if done.returncode == 0:
        return f"{time.perf_counter() - start:.0f} s"
    errors = [line for line in done.stderr.splitlines() if line.startswith("cn-clip: ")]
    return f"failed: {errors[-1] if errors else done.stderr[-300:]}"


def fsdp(device: str, dry: bool) -> dict[str, Any]:
    """Two steps in float32 with FSDP2 in this process: their losses are those without it."""
    import torch
    import torch.distributed as dist

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    plain = training_step(device, True, 16, precision="fp32")
    sharded = training_step(device, True, 16, precision="fp32", sharded=True)
    expected, found = ([run() for _ in range(2)] for run in (plain, sharded))
    difference = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    if not difference < 1e-3:
        raise SystemExit(f"losses {found} with FSDP2, {expected} without")
    dist.destroy_process_group()
    return {"largest relative difference": difference}


def shard_alone(model: Any) -> None:
    """Shard a model with the trainer's function, which refuses to with one process."""
    from unittest import mock

    from cn_clip.train import parallel

    mesh = parallel.init_device_mesh
    with (
        mock.patch.object(parallel.distributed, "world_size", lambda: 2),
        mock.patch.object(parallel, "init_device_mesh", lambda kind, _shape: mesh(kind, (1,))),
    ):
        parallel.shard(model)
    if not parallel.is_sharded(model):
        raise SystemExit("FSDP2 sharded nothing")


def run_limited(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command in a session of its own, which is killed at the limit with its processes.

    Raises:
        subprocess.TimeoutExpired: it was.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def topk(device: str, dry: bool) -> dict[str, Any]:
    """Queries per second of exact top 10, by a matrix product and torch.topk on the device."""
    import torch

    rows, queries = (2_000, 16) if dry else (1_000_000, 256)
    dtype = torch.float32 if dry else torch.float16
    gallery = torch.randn(rows, 512, device=device, dtype=dtype)
    asked = gallery[:queries].clone()
    seconds = best_seconds(lambda: (asked @ gallery.T).topk(10), device)
    return {f"queries/s over {rows:,} rows": queries / seconds}


def best_seconds(run: Callable[[], object], device: str, *, least: float = 1.0) -> float:
    """Return the seconds of the fastest call, after two to warm up."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        run()
    wait()
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < least:
        start = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--part", choices=LIMITS, nargs="+", default=list(LIMITS))
    parser.add_argument("--here", choices=[*LIMITS, "fsdp"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cpu" if options.dry_run else "cuda"
    if options.here:
        print(json.dumps(globals()[options.here](device, options.dry_run)))
        return 0
    return max([run_part(part, options.dry_run) for part in options.part])


def run_part(part: str, dry: bool) -> int:
    """Run and print a part; return 1 if it or one of its values failed."""
    command = [sys.executable, __file__, "--here", part, *(["--dry-run"] if dry else [])]
    start = time.perf_counter()
    try:
        done = run_limited(command, LIMITS[part])
        lines = done.stdout.strip().splitlines()
        text = lines[-1] if done.returncode == 0 and lines else done.stderr[-1500:]
    except subprocess.TimeoutExpired:
        text = f"stopped after {LIMITS[part]} s"
    print(f"== {part} ({time.perf_counter() - start:.0f} s)")
    try:
        values = json.loads(text)
    except ValueError:
        print(f"failed: {text}", flush=True)
        return 1
    for name, value in values.items():
        print(f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value}")
    sys.stdout.flush()
    return int(any(str(value).startswith("failed") for value in values.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Fixtures: tiny models and generated images, without network or large files."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["CN_CLIP_LANG"] = "en"  # of the messages that tests compare, whatever the locale

from cn_clip import config, weights
from cn_clip.config import ModelConfig, TextConfig, VisionConfig
from cn_clip.export import export
from cn_clip.model.clip import CLIP, initialize

# A shell's background job and nohup ignore these, and processes of the tests inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

torch.set_num_threads(1)  # more threads do not help tiny models

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))  # for fill.py
sys.path.insert(0, str(GOLDEN.parent.parent / "docs"))  # for the generators of pages

TEXT = TextConfig(hidden_size=64, layers=2, heads=1, intermediate_size=128)
TINY = {
    "vit": ModelConfig("tiny-vit", 32, VisionConfig("vit", 32, 64, (2,), 8), TEXT),
    "resnet": ModelConfig("tiny-resnet", 32, VisionConfig("resnet", 64, 8, (1, 1, 1, 1)), TEXT),
    "efficientnet_lite": ModelConfig(
        "tiny-lite", 32, VisionConfig("efficientnet_lite", 64), TEXT, background="white"
    ),
}


def make_model(config: ModelConfig, seed: int = 0) -> CLIP:
    model = CLIP(config)
    initialize(model, torch.Generator().manual_seed(seed))
    return model.eval()


@pytest.fixture
def tiny_model() -> CLIP:
    return make_model(TINY["vit"])


@pytest.fixture(params=sorted(TINY))
def any_tiny_model(request: pytest.FixtureRequest) -> CLIP:
    return make_model(TINY[request.param])


def make_image(seed: int = 0, size: tuple[int, int] = (80, 60), mode: str = "RGB") -> Image.Image:
    """Return smooth noise, which JPEG and resizing hardly change, like a photo."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(3):
        make_image(seed).save(folder / f"{seed}.jpg")
    return folder


@pytest.fixture(scope="session")
def golden_strings() -> list[str]:
    return json.loads((GOLDEN / "strings.json").read_text(encoding="utf-8"))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.float64(a), np.float64(b)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CN_CLIP_CACHE", str(tmp_path / ".cache"))


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Limit files of this process to 100 kB, like a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder with the images of ``data.formats``."""
    from data.formats import IMAGES

    folder = tmp_path / "pictures"
    folder.mkdir()
    for image_id, content in IMAGES.items():
        (folder / f"{image_id}.jpg").write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the URIs of 48 training and 16 validation pairs."""
    from train.runs import write_pairs

    folder = tmp_path_factory.mktemp("pairs")
    return write_pairs(folder, "train", range(48)), write_pairs(folder, "val", range(100, 116))


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the weights of a tiny model without dropout."""
    from train.runs import write_start

    return write_start(tmp_path_factory.mktemp("start") / "tiny")


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 40 texts with target embeddings for the tiny models."""
    from train.runs import write_sentences

    return write_sentences(tmp_path_factory.mktemp("sentences") / "texts")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny ViT model; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    weights.save_folder(make_model(TINY["vit"]), folder)
    return folder


@pytest.fixture
def tiny_vit_b_16(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make ViT-B-16 the name of a tiny model, whose file was downloaded before."""
    tiny, text = TINY["vit"], "RoBERTa-wwm-ext-base-chinese"
    small = replace(
        config.MODELS["ViT-B-16"], embed_dim=tiny.embed_dim, vision=tiny.vision, text=TEXT
    )
    monkeypatch.setitem(config.MODELS, "ViT-B-16", small)
    monkeypatch.setitem(config.VISION_TOWERS, "ViT-B-16", tiny.vision)
    monkeypatch.setitem(config.TEXT_TOWERS, text, TEXT)
    monkeypatch.setitem(config.EMBED_DIMS, "ViT-B-16", tiny.embed_dim)
    home = tmp_path_factory.mktemp("home")
    cache = home / ".cache" / "clip"
    cache.mkdir(parents=True)
    weights.save_official(make_model(tiny), cache / "clip_cn_vit-b-16.pt")
    monkeypatch.setenv("HOME", str(home))


@pytest.fixture(scope="session")
def tiny_export(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an ONNX export of ``tiny_checkpoint``; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny") / "export"
    export(tiny_checkpoint, folder)
    return folder


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave tests/export to test_exports.py, which runs it alone, unless pytest is given a path."""
    whole_suite = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return True if whole_suite and collection_path == Path(__file__).parent / "export" else None

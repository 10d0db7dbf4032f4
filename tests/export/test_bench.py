"""The speed of this machine, measured for every backend."""

import json
import shutil

import pytest
from conftest import TINY

from cn_clip.backends.exported import cached_export
from cn_clip.bench import bench
from cn_clip.bench.operations import image_operations, text_operations
from cn_clip.cli import run
from cn_clip.config import MODELS


def test_operations_of_vit_b_16_are_the_known_35_gflop():
    """35.1 GFLOP an image; 300 texts of 10 tokens a second need 512 GFLOP/s, or 1.7 GFLOP each."""
    assert image_operations(MODELS["ViT-B-16"]) == pytest.approx(35.1e9, rel=0.01)
    assert text_operations(MODELS["ViT-B-16"], 10) == pytest.approx(1.7e9, rel=0.02)
    assert image_operations(TINY["resnet"]) is None


@pytest.fixture
def model(tiny_checkpoint, tiny_export, tmp_path, monkeypatch):
    """Return a checkpoint that has an ONNX export in the cache."""
    monkeypatch.setenv("CN_CLIP_CACHE", str(tmp_path / "cache"))
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    shutil.copytree(tiny_export, cached_export(checkpoint, "onnx", "float32"))
    return checkpoint


def test_every_backend_is_measured_in_its_own_process(model):
    result = bench(model, batch_size=4, rounds=2)
    measured = {(speed.backend, speed.precision) for speed in result.backends}
    assert measured >= {
        ("torch", "float32"),
        ("torch", "bfloat16"),
        ("onnx", "float32"),
        ("openvino", "float32"),
    }
    assert set(result.skipped) <= {
        f"openvino bfloat16 ({cached_export(model, 'onnx', 'float32').name})"
    }
    by_name = {(speed.backend, speed.precision): speed for speed in result.backends}
    onnx, torch = by_name["onnx", "float32"], by_name["torch", "float32"]
    assert onnx.peak_mb < torch.peak_mb  # it does not import torch
    for speed in result.backends:
        assert 0 < speed.image_ms[0] <= speed.image_ms[1]
        assert 0 < speed.text_ms[0] <= speed.text_ms[1]
        assert speed.images_per_s > 0 and speed.texts_per_s > 0 and 0 < speed.image_share < 1
    assert [floor.precision for floor in result.floors] == ["float32", "bfloat16", "int8"]
    assert all(stage.per_second > 0 for stage in result.stages)


def test_the_command_prints_a_table_json_and_one_line(model, capsys):
    folder = str(cached_export(model, "onnx", "float32"))
    assert run(["bench", "--model", folder, "--rounds", "1", "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert "onnx" in printed and "openvino" in printed and "torch" not in printed
    assert printed.splitlines()[-1].startswith("cn-clip ")
    assert run(["bench", "--model", folder, "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["batch_size"] == 8 and len(result["backends"]) >= 2
    assert run(["bench", "--rounds", "0"]) == 2

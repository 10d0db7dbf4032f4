"""What a run will cost, beside what it does cost."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, make_model
from data.test_index import write_shards
from torch.utils.flop_counter import FlopCounterMode
from train.runs import make_recipe

from cn_clip.cli import run
from cn_clip.data.sources.open import open_mix
from cn_clip.train.cost import DataSize, data_size, run_cost
from cn_clip.train.loop import train
from cn_clip.train.run.checkpoint import states
from cn_clip.train.run.log import read_log

DATA = DataSize(48, 48)


def cost_of(pairs, start, data=DATA, world_size=1, **stage):
    recipe = make_recipe(pairs, start, "run", stage)
    [cost] = run_cost(recipe, data, world_size=world_size).stages
    return cost


def test_the_steps_are_those_of_the_run(pairs, start, tmp_path):
    values = make_recipe(pairs, start, tmp_path / "run", {"name": "b", "global_batch_size": 20})
    train(values)
    steps = sum(event["kind"] == "step" for event in read_log(tmp_path / "run"))
    [cost] = run_cost(values, data_size(open_mix(values.data.train))).stages
    assert cost.steps == steps == 6


def test_a_state_has_the_size_that_was_told(pairs, start, tmp_path):
    recipe = make_recipe(pairs, start, tmp_path / "run")
    train(recipe)
    state = states(tmp_path / "run")[-1]
    size = sum(file.stat().st_size for file in state.rglob("*") if file.is_file())
    [cost] = run_cost(recipe, DATA).stages
    assert cost.state_bytes == pytest.approx(size, rel=0.15)  # names and small tensors


def test_operations_are_those_that_torch_counts_in_a_step(pairs, start):
    model = make_model(TINY["vit"])
    images, texts = torch.zeros(4, 3, 32, 32), torch.ones(4, 52, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        (model.encode_image(images).sum() + model.encode_text(texts).sum()).backward()
    cost = cost_of(pairs, start, epochs=1, global_batch_size=48)
    # The first of few layers has no gradient of its input.
    assert cost.flops == pytest.approx(12 * counter.get_total_flops(), rel=0.2)


def test_locked_cached_and_recomputed_towers_cost_what_they_should(pairs, start):
    full = cost_of(pairs, start, epochs=2)
    locked = cost_of(pairs, start, epochs=2, freeze=["visual.*"])
    cached = cost_of(
        pairs, start, epochs=2, freeze=["visual.*"], cached=True, augment=True, views=2
    )
    image = (full.flops - locked.flops) / 2  # twice backwards
    assert cached.flops == pytest.approx(locked.flops - image)
    assert cached.feature_flops == pytest.approx(image)  # 48 images, two views; 2 epochs of 48
    assert cached.cache_bytes == 48 * 2 * 32 * 4
    parts = cost_of(pairs, start, epochs=2, micro_batch_size=4)
    assert parts.flops == pytest.approx(full.flops * 4 / 3)
    assert locked.memory_bytes < full.memory_bytes and locked.state_bytes < full.state_bytes


def test_the_last_batch_counts_if_each_process_has_a_pair(pairs, start):
    data = replace(DATA, pairs=50)
    assert cost_of(pairs, start, data, epochs=2).steps == 2 * 4
    assert cost_of(pairs, start, data, world_size=4, epochs=2).steps == 2 * 3


def test_data_is_measured_by_its_index(tmp_path, pairs):
    uri = write_shards(tmp_path, 3)
    source = open_mix([uri])[0].source
    size = sum(len(source.image(index)) for index in range(15))
    assert data_size(open_mix([uri])) == DataSize(15, 15, size, 7.0)
    half = data_size(open_mix([f"0.4@{uri}", pairs[0]]))
    assert half == DataSize(6 + 48, 15 + 48, None, 7.0)


def test_the_cost_is_printed_and_nothing_is_trained(tmp_path, capsys, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    uri = write_shards(tmp_path, 3)
    flags = ["train", "--recipe", "finetune-small", "--start.checkpoint", str(start)]
    flags += ["--train-data", uri, "--val-data", "missing.tar", "--show", "cost"]
    assert run([*flags, "--gpus", "2"]) == 0
    out = capsys.readouterr().out
    assert "15 pairs, at most 15 images" in out and "days on 2 GPUs" in out
    assert run([*flags, "--json", "--tflops", "1", "--efficiency", "0.5"]) == 0
    values = json.loads(capsys.readouterr().out)
    [stage], [seconds] = values["stages"], values["seconds"]
    assert seconds == pytest.approx((stage["flops"] + stage["feature_flops"]) / 0.5e12)
    assert run([*flags, "--pairs", "1000"]) == 0
    assert "1,000 pairs" in capsys.readouterr().out
    assert run([*flags, "--efficiency", "0"]) == 2
    assert not (tmp_path / "run").exists()

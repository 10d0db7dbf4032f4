"""Two and four processes do what one does: started by torchrun, over gloo."""

import copy
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch
from train.runs import recipe_values, write_pairs, write_sentences, write_start

from cn_clip import embedder, weights
from cn_clip.backends.torch import TorchBackend
from cn_clip.data.pack import pack
from cn_clip.data.sources.open import open_source
from cn_clip.train.loop import train
from cn_clip.train.recipe.toml import build_recipe
from cn_clip.train.run.log import read_log
from cn_clip.train.run.signals import InterruptedRun

# 10 steps of stage 1 and 10 of stage 2; the last batch of each epoch has 8 of 20 pairs.
STAGES = (
    {"name": "locked", "freeze": ["visual.*"], "cached": True, "steps": 10, "interpolate": 0.5},
    {"name": "all", "augment": True, "steps": 10},
)


def values(pairs, start, out, **tables):
    # 10 texts: shares of 3 and of 2, among four processes.
    texts = str(write_sentences(out.parent / "sentences"))
    held = {"loss": {"text_targets": texts, "text_targets_batch_size": 10}}
    stages = [dict(stage, epochs=None, global_batch_size=20, **held) for stage in STAGES]
    found = recipe_values(pairs, start, out, *stages, **tables)
    for stage in found["stages"]:
        del stage["epochs"]
        stage["optimizer"] = {"max_grad_norm": 1e6} | stage["optimizer"]  # so that norms are logged
    return found


def torchrun(processes, recipe, tmp_path, *flags):
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "cn_clip", "train"]
    return subprocess.run(
        [*command, "--recipe", str(file), *flags], capture_output=True, text=True, timeout=300
    )


def logged(folder, name="loss"):
    return [event[name] for event in read_log(folder) if event["kind"] == "step"]


@pytest.fixture(scope="module")
def alone(pairs, start, tmp_path_factory):
    """The losses, lengths of gradients and weights that one process comes to."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(build_recipe(values(pairs, start, folder, output={"log_every": 1})))
    norms = logged(folder, "gradient_norm")
    return logged(folder), norms, weights.read(folder / "final").tensors


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_give_the_losses_gradients_and_weights_of_one(
    pairs, start, tmp_path, alone, processes
):
    recipe = values(pairs, start, tmp_path / "run", output={"log_every": 1})
    done = torchrun(processes, recipe, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = logged(tmp_path / "run")
    assert len(found) == 20
    assert found == pytest.approx(alone[0], abs=1e-5)
    norms = logged(tmp_path / "run", "gradient_norm")
    assert norms == pytest.approx(alone[1], rel=1e-4, abs=1e-5)
    together = weights.read(tmp_path / "run" / "final").tensors
    for name, tensor in alone[2].items():  # 20 steps of Adam: what gradients differ by, summed up
        assert (together[name] - tensor).abs().max() < 2e-4, name


def test_two_processes_read_streamed_shards_in_the_order_of_one(pairs, start, tmp_path):
    pack(open_source(pairs[0]), tmp_path / "shards", images_per_shard=7)
    pairs = f"tar:{tmp_path}/shards/*.tar?order=stream", pairs[1]
    out = {"log_every": 1}
    train(build_recipe(recipe_values(pairs, start, tmp_path / "one", output=out)))
    recipe = recipe_values(pairs, start, tmp_path / "two", output=out)
    done = torchrun(2, recipe, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = logged(tmp_path / "two")
    assert len(found) == 6
    assert found == pytest.approx(logged(tmp_path / "one"), abs=1e-5)


def test_sharded_weights_give_the_losses_and_norms_of_one_process(pairs, start, tmp_path):
    found = {}
    for parallel, processes in (("fsdp", 2), ("ddp", 1)):
        run = tmp_path / parallel
        machine = {"device": "cpu", "precision": "fp32", "parallel": parallel}
        output = {"log_every": 1, "save_every": 4, "background_saves": True}
        recipe = values(pairs, start, run, output=output, machine=machine)
        for stage in recipe["stages"]:
            stage["optimizer"] |= {"ema": 0.9, "max_grad_norm": 1.0}
        done = torchrun(processes, recipe, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        found[parallel] = logged(run), logged(run, "gradient_norm")
    assert found["fsdp"][0] == pytest.approx(found["ddp"][0], abs=1e-5)
    assert found["fsdp"][1] == pytest.approx(found["ddp"][1], rel=1e-3)
    assert max(found["ddp"][1]) > 1  # something was clipped


@pytest.mark.full
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_several_processes_measure_the_mixtures_of_one(pairs, start, tmp_path, parallel):
    found = []
    for processes, way in ((1, "ddp"), (2, parallel)):
        run = tmp_path / f"{processes}"
        machine = {"device": "cpu", "precision": "fp32", "parallel": way}
        data = {"val": [pairs[0]], "keep_data": [pairs[1]]}
        recipe = values(pairs, start, run, machine=machine, data=data)
        recipe["stages"] = [recipe["stages"][1] | {"interpolate": "auto"}]
        done = torchrun(processes, recipe, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        found += [event["mixtures"] for event in read_log(run) if event["kind"] == "mixtures"]
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=0.03)  # a tie may fall otherwise


def test_sharded_weights_are_evaluated_on_any_number_of_images(start, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    sources = write_pairs(folder, "train", range(20)), write_pairs(folder, "val", range(65, 130))
    machine = {"device": "cpu", "precision": "fp32", "parallel": "fsdp"}
    recipe = values(sources, start, tmp_path / "run", machine=machine)
    recipe["stages"] = [recipe["stages"][1] | {"steps": 1}]
    done = torchrun(2, recipe, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_resumes_in_the_same_order_with_another_number_of_processes(pairs, start, tmp_path):
    """Two processes do four steps, one does the rest: the losses are those of one alone."""
    run = tmp_path / "run"
    output = {"log_every": 1, "save_every": 1, "background_saves": True}
    recipe = values(pairs, start, run, output=output)
    recipe["stages"] = [recipe["stages"][1] | {"steps": 8}]
    recipe["stages"][0]["optimizer"]["schedule"] = "constant"  # so that the length decides nothing
    whole = copy.deepcopy(recipe)
    whole["output"]["folder"] = str(tmp_path / "whole")
    recipe["stages"][0]["steps"] = 4
    assert torchrun(2, recipe, tmp_path).returncode == 0
    recipe["stages"][0]["steps"] = 8
    done = torchrun(1, recipe, tmp_path, "--resume", "auto", "--allow-changes")
    assert done.returncode == 0, done.stderr[-3000:]
    assert torchrun(1, whole, tmp_path).returncode == 0
    assert logged(run) == pytest.approx(logged(tmp_path / "whole"), abs=1e-5)


@pytest.mark.parametrize("kind", ["resnet", "efficientnet_lite"])
def test_processes_have_equal_batch_norm_statistics(pairs, tmp_path, kind):
    """Resumed, each gets the statistics of one: so they must have been the same before."""
    begin = write_start(tmp_path / "start", kind)
    recipe = values(pairs, begin, tmp_path / "run", output={"log_every": 1, "save_every": 1})
    recipe["stages"] = [recipe["stages"][1] | {"steps": 4, "batch_norm": "train"}]
    assert torchrun(2, recipe, tmp_path).returncode == 0
    whole = logged(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "states" / "000000004")
    (tmp_path / "run" / "outcome.json").unlink()
    done = torchrun(2, recipe, tmp_path, "--resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(tmp_path / "run") == whole


def test_an_error_in_one_process_ends_all_with_its_sentence(pairs, start, tmp_path):
    recipe = values(pairs, start, tmp_path / "run")
    recipe["stages"][0]["freeze"] = ["visual.*", "bret.*"]
    done = torchrun(2, recipe, tmp_path)
    assert done.returncode != 0
    assert "the pattern 'bret.*' matches no parameter; did you mean bert" in done.stderr


def stopped_process(index, recipe, folder, port, own_texts):
    """Train; in the second evaluation, process 1 receives SIGTERM before its second batch."""
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    embedder._TEXTS_PER_BATCH = 1
    run_texts, batches = TorchBackend.run_texts, []

    def counted(self, ids, mask):
        batches.append(len(ids))
        if index == 1 and len(batches) == own_texts + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_texts(self, ids, mask)

    TorchBackend.run_texts = counted
    with pytest.raises(InterruptedRun) as stop:
        train(build_recipe(recipe))
    (folder / f"{index}.json").write_text(json.dumps([stop.value.code, batches]))
    os._exit(0)  # as torchrun ends it: the group waits for nobody


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.full)])
def test_a_signal_to_one_process_stops_the_evaluation_of_all(pairs, start, tmp_path, parallel):
    (tmp_path / "data").mkdir()
    sources = (write_pairs(tmp_path / "data", name, range(13)) for name in ("train", "val"))
    machine = {"device": "cpu", "precision": "fp32", "parallel": parallel}
    recipe = values(tuple(sources), start, tmp_path / "run", machine=machine)
    recipe["stages"] = [recipe["stages"][1] | {"steps": 2}]
    own_texts = (6, 7) if parallel == "ddp" else (13, 13)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["cn_clip.train.loop"])
    torch.multiprocessing.start_processes(
        stopped_process, (recipe, tmp_path, port, own_texts[1]), nprocs=2, start_method="forkserver"
    )
    for index in range(2):
        code, batches = json.loads((tmp_path / f"{index}.json").read_text())
        assert code == 128 + signal.SIGTERM
        assert len(batches) == own_texts[index] + 2  # not one more batch


@pytest.mark.full
def test_killed_processes_start_again_and_end_as_if_they_had_not_been(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "long_run.py"
    options = ["--steps", "60", "--save-every", "10", "--kills", "2"]
    done = subprocess.run(
        [sys.executable, script, "--folder", tmp_path, *options], capture_output=True, text=True
    )
    assert "60 steps, 2 kills" in done.stdout, done.stdout + done.stderr
    assert "equal losses: 60 of 60" in done.stdout and "equal weights: True" in done.stdout

"""A run that was stopped goes on as if it had not been, whatever stopped it."""

import os
import random
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from train.runs import make_recipe, recipe_values, write_start

from cn_clip.data.pack import pack
from cn_clip.data.sources.open import open_source
from cn_clip.errors import CheckpointError
from cn_clip.train.loop import train
from cn_clip.train.run import checkpoint
from cn_clip.train.run.log import read_log
from cn_clip.train.run.signals import InterruptedRun

AVERAGED = {"learning_rate": 1e-3, "warmup": 2, "ema": 0.9, "max_grad_norm": 1.0}


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """Weights of a tiny model with dropout, whose draws have to come again."""
    return write_start(tmp_path_factory.mktemp("dropping") / "tiny", dropout=0.1)


@pytest.fixture(scope="module")
def stages(sentences):
    held = {"loss": {"text_targets": str(sentences), "text_targets_batch_size": 12}}
    locked = {"name": "locked", "freeze": ["visual.*"], "cached": True, "interpolate": 0.75}
    return locked | held, {"name": "all", "augment": True, "micro_batch_size": 6} | held


def losses(folder):
    return {event["total"]: event["loss"] for event in read_log(folder) if event["kind"] == "step"}


def scores(folder):
    return {
        (event["total"], event["stage"]): event["mean_recall"]
        for event in read_log(folder)
        if event["kind"] == "score"
    }


def stopping_at(step, number=signal.SIGTERM):
    def tell(event):
        if event["kind"] == "step" and event["total"] == step:
            os.kill(os.getpid(), number)

    return tell


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_resumes_bit_equal(pairs, dropping, stages, tmp_path, workers):
    options = {"data": {"workers": workers}, "output": {"log_every": 1}}
    stages = [stage | {"optimizer": AVERAGED} for stage in stages]
    whole = make_recipe(pairs, dropping, tmp_path / "whole", *stages, **options)
    wanted = train(whole)
    parts = make_recipe(pairs, dropping, tmp_path / "parts", *stages, **options)
    for step in (2, 6, 8, 11):  # within an epoch, at a stage's end, within the next
        with pytest.raises(InterruptedRun, match=rf"step {step}; the state is saved") as stopped:
            train(parts, resume=True, on_event=stopping_at(step))
        assert stopped.value.code == 128 + signal.SIGTERM
    outcome = train(parts, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert scores(tmp_path / "parts") == scores(tmp_path / "whole")
    assert outcome.scores == wanted.scores


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_of_streamed_shards_resumes_bit_equal(pairs, start, tmp_path, cached):
    shards = tmp_path / "shards"
    pack(open_source(pairs[0]), shards, images_per_shard=7)
    pairs = f"tar:{shards}/*.tar?order=stream", pairs[1]
    stage = {"cached": True, "freeze": ["visual.*"]} if cached else {"augment": True}
    options = {"data": {"workers": 2}, "output": {"log_every": 1}}
    train(make_recipe(pairs, start, tmp_path / "whole", stage, **options))
    parts = make_recipe(pairs, start, tmp_path / "parts", stage, **options)
    for step in (2, 4):  # within each epoch
        with pytest.raises(InterruptedRun):
            train(parts, resume=True, on_event=stopping_at(step))
    train(parts, resume=True)
    assert len(losses(tmp_path / "whole")) == 6
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_ctrl_c_saves_too(pairs, dropping, tmp_path):
    recipe = make_recipe(pairs, dropping, tmp_path / "run")
    with pytest.raises(InterruptedRun) as stopped:
        train(recipe, on_event=stopping_at(1, signal.SIGINT))
    assert stopped.value.code == 130
    assert checkpoint.states(tmp_path / "run")[-1].name == "000000001"


def killed_and_resumed(pairs, start, stages, tmp_path, kills, seed):
    """Start a run in a process of its own, kill it at random moments, and let it end."""
    import tomli_w

    options = {"output": {"log_every": 1, "save_every": 1}}
    whole = make_recipe(pairs, start, tmp_path / "whole", *stages, **options)
    train(whole)
    values = recipe_values(pairs, start, tmp_path / "killed", *stages, **options)
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(values), encoding="utf-8")
    command = [sys.executable, "-m", "cn_clip", "train", "--recipe", str(file), "--resume", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: more threads sum otherwise
    draw = random.Random(seed)
    while kills:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        with process:
            assert process.stdout is not None
            lines = draw.randrange(0, 8)  # kill it after so many lines, and a little later
            for _ in range(lines):
                if not process.stdout.readline():
                    break
            time.sleep(draw.random() * 0.3)
            if process.poll() is not None:
                break  # it was done before
            process.kill()
        kills -= 1
        for state in checkpoint.states(tmp_path / "killed"):
            checkpoint.read_progress(state)  # whole, or not there
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")
    return kills


def test_a_killed_run_resumes_bit_equal(pairs, dropping, stages, tmp_path):
    killed_and_resumed(pairs, dropping, stages, tmp_path, kills=3, seed=1)


@pytest.mark.full
def test_a_run_killed_twenty_times_resumes_bit_equal(pairs, dropping, stages, tmp_path):
    kills, seed = 20, 0
    while kills:  # a run may end before all of them have come: then another one
        seed += 1
        folder = tmp_path / str(seed)
        folder.mkdir()
        kills = killed_and_resumed(pairs, dropping, stages, folder, kills, seed)


def test_an_incomplete_state_is_ignored_and_removed_by_the_next_save(pairs, dropping, tmp_path):
    recipe = make_recipe(pairs, dropping, tmp_path / "run")
    with pytest.raises(InterruptedRun):
        train(recipe, on_event=stopping_at(1))
    left = tmp_path / "run" / "states" / ".000000002.abcdefgh.cn-clip-tmp" / "new" / "tensors"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    assert checkpoint.states(tmp_path / "run")[-1].name == "000000001"
    train(recipe, resume=True)
    assert not left.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no groups of processes")
def test_ctrl_c_for_the_process_group_saves_the_run(pairs, dropping, tmp_path):
    import tomli_w

    options = {"data": {"workers": 2}, "output": {"log_every": 1}}
    values = recipe_values(pairs, dropping, tmp_path / "run", {"epochs": 1000}, **options)
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(values), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-m", "cn_clip", "train", "--recipe", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "step 2:" in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 130, told
    assert "the state is saved" in told and "Traceback" not in told


def test_a_state_written_in_the_background_is_that_of_its_step(
    pairs, dropping, tmp_path, monkeypatch
):
    saved, during = checkpoint.save, []

    def slowly(*arguments, **options):
        time.sleep(0.2)
        during.append(len(losses(tmp_path / "run")))
        saved(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", slowly)
    found = {}
    for name, background in (("whole", False), ("run", True)):
        options = {"log_every": 1, "save_every": 2, "keep": 100, "background_saves": background}
        stage = {"optimizer": AVERAGED}
        train(make_recipe(pairs, dropping, tmp_path / name, stage, output=options))
        states = checkpoint.states(tmp_path / name)
        found[name] = {state.name: tensors_of(state) for state in states}
        assert {event["total"] for event in read_log(tmp_path / name) if event["kind"] == "saved"}
    assert max(during[:-1]) > 2  # steps went on while a state was written
    assert found["run"].keys() == found["whole"].keys()
    for state, tensors in found["whole"].items():
        for name, values in tensors.items():
            assert torch.equal(found["run"][state][name], values), (state, name)


def test_a_state_that_cannot_be_written_in_the_background_ends_the_run(
    pairs, dropping, tmp_path, monkeypatch
):
    def full(*unused, **also_unused):
        raise OSError(28, "No space left on device")

    options = {"save_every": 2, "background_saves": True}
    recipe = make_recipe(pairs, dropping, tmp_path / "run", {"epochs": 1}, output=options)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(CheckpointError, match=r"was not saved .*No space left"):
            train(recipe)
    assert train(recipe, resume=True).steps == 3


def tensors_of(state):
    """Return the tensors of a state by name, read without knowledge of the model."""
    tensors = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _load_state_dict(
            tensors,
            storage_reader=FileSystemReader(state / "tensors"),
            planner=_EmptyStateDictLoadPlanner(),
            no_dist=True,
        )
    return dict(flatten(tensors))


def flatten(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value

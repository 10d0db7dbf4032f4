"""``cn-clip train`` as people and pipelines meet it: what it prints, and its exit codes."""

import json
import os
import signal
import subprocess
import sys

import pytest
import tomli_w
from train.runs import recipe_values

from cn_clip.cli import run


@pytest.fixture
def recipe_file(pairs, start, tmp_path):
    """Write a recipe with changes, and return its path."""

    def write(*stages, **tables):
        values = recipe_values(pairs, start, tmp_path / "run", *stages, **tables)
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(values), encoding="utf-8")
        return str(path)

    return write


def test_a_run_prints_its_progress(recipe_file, capsys, tmp_path):
    assert run(["train", "--recipe", recipe_file()]) == 0
    said = capsys.readouterr().out
    for piece in (
        "tensors) from",
        "stage train: 6 steps of 16 pairs",
        "mean recall before training:",
        "step 6: loss",
        ", before ",
        ", best ",
        "mean recall of the final weights:",
        "report.html",
    ):
        assert piece in said, piece


def test_a_run_ends_with_one_document_for_machines(recipe_file, capsys, tmp_path):
    assert run(["train", "--recipe", recipe_file(), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["steps"] == 6
    assert outcome["weights"] == str(tmp_path / "run" / "final")
    assert [name for name, _ in outcome["scores"]] == ["before", "train", "final"]


def test_the_recipe_is_shown_as_it_would_be_carried_out(recipe_file, capsys, tmp_path):
    flags = ["--epochs", "7", "--lr", "1e-5", "--stages.train.lora", "on"]
    assert run(["train", "--recipe", recipe_file(), "--show", "recipe", *flags]) == 0
    shown = capsys.readouterr().out
    assert "epochs = 7" in shown and "learning_rate = 1e-05" in shown and "[stages.lora]" in shown
    assert not (tmp_path / "run").exists()


def test_parameters_are_shown_for_patterns(recipe_file, capsys):
    assert run(["train", "--recipe", recipe_file(), "--show", "parameters"]) == 0
    assert "text_projection [64, 32]" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--recipe", "two-stag"], "did you mean two-stage?"),
        ([], "which recipe? Give --recipe"),
        (["--recipe", "distill", "--epochz", "3"], "unknown flag --epochz; did you mean --epochs"),
        (["--recipe", "distill", "--epochs", "three"], "is 'three'; give a whole number"),
        (["--recipe", "distill"], "the recipe has no training data; give --train-data"),
        (["--recipe", "two-stage", "--train-data", "x"], "there are no validation pairs"),
        (["--recipe", "distill", "--global-batch-size", "1"], "is 1; give 2 to"),
    ],
)
def test_bad_usage_is_one_sentence_with_its_remedy(flags, sentence, capsys):
    assert run(["train", *flags]) == 2
    told = capsys.readouterr()
    assert sentence in told.err and told.err.count("\n") == 1 and not told.out


def test_a_missing_file_of_weights_stops_the_run(recipe_file, capsys):
    assert run(["train", "--recipe", recipe_file(), "--image", "nowhere.pt"]) == 1
    assert (
        "no such file: nowhere.pt; give a file with the visual.* weights" in capsys.readouterr().err
    )


def test_resume_with_a_checkpoint_starts_from_it(recipe_file, capsys, start):
    assert (
        run(["train", "--recipe", recipe_file(), "--resume", str(start), "--show", "recipe"]) == 0
    )
    assert f'checkpoint = "{start}"' in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM ends a process there at once")
def test_sigterm_saves_and_leaves_with_its_exit_code(recipe_file, tmp_path):
    file = recipe_file({"epochs": 10_000}, evaluation={"every_epochs": 0})
    command = [sys.executable, "-m", "cn_clip", "train", "--recipe", file]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "step 2:" in line:
                break
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
    assert "the state is saved. Resume with: --resume auto" in told
    assert "Traceback" not in told


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a terminal of its own")
def test_a_terminal_that_is_closed_saves_the_run(recipe_file, tmp_path):
    import fcntl
    import termios

    file = recipe_file({"epochs": 10_000}, evaluation={"every_epochs": 0})
    master, terminal = os.openpty()

    def in_terminal():
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-m", "cn_clip", "train", "--recipe", file],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=in_terminal,
    )
    os.close(terminal)
    try:
        shown = b""
        while b"step 2:" not in shown:
            shown += os.read(master, 4096)
        os.close(master)
        assert process.wait(timeout=60) == 128 + signal.SIGHUP
    finally:
        process.kill()
    assert [*(tmp_path / "run" / "states").iterdir()]

"""The words of the command line: what is typed is what messages name, with the remedy."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_image
from data.formats import write_csv
from train.runs import write_start

from cn_clip import hub, weights
from cn_clip.cli import run, show, train
from cn_clip.cli.show import Rate
from cn_clip.cli.train_events import EventLines
from cn_clip.cli.train_help import GROUPS
from cn_clip.config import MODELS, PUBLISHED
from cn_clip.data.pack import pack
from cn_clip.data.sources.open import open_source
from cn_clip.data.sources.table import COLUMN_NAMES, choose_columns
from cn_clip.model.clip import CLIP
from cn_clip.sample import embedded_sample

SMALL = ["train", "--recipe", "finetune-small", "--show", "recipe"]
MUGE = ["train", "--recipe", "finetune-muge", "--show", "recipe"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["models", "--jsn"], "cn-clip models --help"),
        (["data", "pack", "a.csv"], "cn-clip data pack --help"),
        (["eval", "retrieval", "--foo"], "cn-clip eval retrieval --help"),
        (["data", "paack"], "cn-clip data --help"),
        (["foo"], "cn-clip --help"),
        (["search", "猫", "--tpo", "3"], "unknown option --tpo (did you mean --top?)"),
        (["search", "猫", "--results=3"], "unknown option --results;"),
        (["search", "猫", "-k", "3"], "unknown option -k; run `cn-clip search --help`"),
        ([*SMALL, "--epoch", "3"], "did you mean --epochs"),
        ([*SMALL, "--epoch", "3"], "cn-clip train --help"),
        ([*SMALL, "--max-epoch", "3"], "did you mean --max-epochs"),
        ([*SMALL, "--lr", "fast"], "--lr is 'fast'; give a number"),
        ([*SMALL, "--learning_rate", "fast"], "--learning_rate is 'fast'; give a number"),
        ([*SMALL, "--epochs", "0"], "--epochs is 0; give 1 to"),
        ([*SMALL, "--batch-size", "x"], "--batch-size is 'x'; give a whole number"),
        ([*SMALL, "--batch-size", "1"], "--batch-size is 1; give 2 to"),
        ([*SMALL, "--precision", "half"], "unknown --precision 'half'"),
        ([*SMALL, "--lr-multipliers", "x"], "lr_multipliers has the entry 'x'"),
        (["data", "check", "nowhere"], "no such file or folder: nowhere"),
        (["eval", "retrieval", "--data", "nowhere"], "no such file or folder: nowhere"),
        (["data", "check", "csv:no.csv", "--report", "a.pdf"], "give a name that ends in .html"),
        (["classify", "a.jpg", "--labels", "a,b", "--device", "gpu"], "no such file"),
    ],
)
def test_a_mistake_is_named_as_it_was_typed(arguments, words, capsys):
    assert run(arguments) in (1, 2)
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert not re.search(r"stages\.NAME|Tokenizer\.|save_folder|_app\b", err)


@pytest.mark.parametrize(
    ("given", "meant"), [("gpu", "cuda"), ("GPU:1", "cuda:1"), ("metal", "mps")]
)
def test_the_usual_name_of_a_device_is_offered(given, meant, image_folder, capsys):
    words = ["classify", str(image_folder), "--labels", "猫,狗", "--device", given]
    assert run(words) == 2
    assert f"did you mean {meant}? torch" in capsys.readouterr().err


def test_the_help_of_train_has_the_flags_that_people_need(capsys):
    assert run(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in (
        "--train-data",
        "--val-data",
        "--epochs",
        "--lr",
        "--batch-size",
        "--output.folder",
    ):
        assert flag in text
    assert "Example: cn-clip train --recipe" in " ".join(text.split())
    values = {"INT": "4", "FLOAT": "0.5", "NAME": "fp32", "on": "on", "": None}
    for rows in GROUPS.values():
        for flags, placeholder, _option in rows:
            for flag in flags.split():
                value = "cpu" if flag == "--device" else values.get(placeholder, "a.csv")
                given = [*MUGE, "--val-data", "a.csv", flag, *([value] if value else [])]
                given += ["--interpolate", "auto"] if flag == "--keep-data" else []
                assert run(given) == 0, capsys.readouterr().err


def test_models_are_listed_without_torch():
    code = "import sys; from cn_clip.cli import run; run(['models', '--json']); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_numbers_of_parameters_are_those_of_the_models():
    from cn_clip.cli.models import _embedded_parameters

    configs = {name: MODELS[name] for name in PUBLISHED}
    configs["mini"] = weights.read_config(hub.EMBEDDED_FOLDER)
    for name, config in configs.items():
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in CLIP(config).parameters())
        told = _embedded_parameters(hub.EMBEDDED_FOLDER) if name == "mini" else None
        assert (told or PUBLISHED[name].parameters) == count, name


def test_a_run_given_as_a_model_offers_its_result(tiny_checkpoint, tmp_path, image_folder, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text("")
    for name in ("start", "final"):
        (tmp_path / "run" / name).symlink_to(tiny_checkpoint)
    words = ["classify", str(image_folder), "--labels", "猫,狗", "--model", f"{tmp_path}/run"]
    assert run(words) == 1
    assert f"it is a training run: give {tmp_path}/run/final" in capsys.readouterr().err


def test_packing_counts_what_it_leaves_out(pictures, tmp_path):
    source = open_source(write_csv(pictures))
    done = pack(source, tmp_path / "out", without=np.array([1, 2]))
    assert (done.left_out, done.pairs, done.skipped) == (2, 2, [])


@pytest.mark.parametrize("image", ["图片", "图像", "文件名", "Image", "image path", "URL"])
@pytest.mark.parametrize("text", ["标题", "描述", "文本", "Caption", "TEXT"])
def test_columns_are_recognised_by_their_usual_names(image, text):
    columns = choose_columns("csv:x", ("价格", image, text), {})
    assert (columns.image, columns.text) == (image, text)


def test_the_names_of_columns_are_distinct():
    names = [name for names in COLUMN_NAMES.values() for name in names]
    assert len(set(names)) == len(names) and all(name == name.lower() for name in names)


def step(number, speed):
    return {
        "kind": "step", "total": number, "step": number, "mean_loss": 1.0, "lr": 1e-4,
        "logit_scale": 14.3, "pairs_per_second": speed, "skipped": 0,
    }  # fmt: skip


def test_the_time_left_follows_the_speed_of_a_stage():
    lines = EventLines()
    stage = {"kind": "stage", "total": 0, "stage": "one", "steps": 100, "batch": 60, "lr": 1e-4,
             "trainable": 1e6, "warmup": 1, "batch_norm": None}  # fmt: skip
    list(lines.of(stage))
    (first,) = lines.of(step(1, 3.0))  # it warms up, and is no measure
    (second,) = lines.of(step(40, 10.0))
    (last,) = lines.of(step(100, 10.0))
    assert "left" not in first and "left" not in last
    assert second.endswith(", 0:06:00 left")  # 60 steps of 60 pairs, 10 pairs a second


def test_lines_say_which_weights_a_score_is_of():
    def line(stage, total):
        event = {"kind": "score", "total": total, "stage": stage, "step": total, "best": 0.4,
                 "mean_recall": 0.5, "before": 0.3} | dict.fromkeys(
                     ("t2i_r1", "t2i_r10", "i2t_r1", "i2t_r10"), 0.5)  # fmt: skip
        (text,) = EventLines().of(event)
        return text

    assert "mean recall before training: 50.00 % (" in line("one", 0)
    assert "at step 7: 50.00 %, before training 30.00 %, best before this 40.00 %" in line("one", 7)
    assert "of the interpolated weights" in line("one, mixed", 7)
    assert "of the final weights" in line("final", 7)


def test_a_rate_is_smooth_from_the_start_and_follows(monkeypatch):
    now = 0.0
    monkeypatch.setattr(show.time, "perf_counter", lambda: now)
    rate = Rate()
    rates = []
    for second in range(1, 101):
        now = float(second)
        # Bursts of 20 every two seconds, then of 40.
        rates.append(rate.update(10 * (second - second % 2) * (1 if second <= 50 else 2)))
    assert all(6 < each < 14 for each in rates[3:50])
    assert rates[99] == pytest.approx(20, rel=0.3)


def test_help_in_a_terminal_of_one_column_ends_soon():
    words = [sys.executable, "-m", "cn_clip", "train", "--help"]
    environment = {**os.environ, "COLUMNS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=30)
    assert "--train-data" in done.stdout


def test_the_missing_result_of_a_run_is_named_as_such(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/recipe.toml").touch()
    make_image(0).save("a.jpg")
    assert run(["classify", "a.jpg", "--labels", "猫,狗", "--model", "run/final"]) == 2
    assert "the training run in run has not finished" in capsys.readouterr().err


def test_the_model_of_a_score_is_named_as_it_was_given(tmp_path, capsys):
    model = write_start(tmp_path / "mine")
    sample = embedded_sample()
    pairs = list(zip(sample.images, sample.captions, strict=True))[:3]
    rows = ["image,caption", *(f"{image},{caption}" for image, caption in pairs)]
    (tmp_path / "pairs.csv").write_text("\n".join(rows), encoding="utf-8")
    given = ["--data", f"csv:{tmp_path}/pairs.csv", "--model", str(model)]
    assert run(["eval", "retrieval", *given]) == 0
    assert capsys.readouterr().out.startswith(f"{model} ")


def test_a_table_in_a_pipe_has_no_trailing_blanks(capsys):
    assert run(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5 and all(line == line.rstrip() for line in lines)


def test_a_sentence_in_a_pipe_is_one_line(capsys):
    show.console().print("词" * 300, markup=False)
    assert capsys.readouterr().out == "词" * 300 + "\n"


def test_a_log_says_how_far_a_run_is_when_it_prints_nothing_else(monkeypatch, capsys):
    monkeypatch.setattr(train, "_SILENCE", 0.2)
    with train._event_printer(quiet=False) as on_event:
        for done in range(5):
            on_event({"kind": "tick", "what": "computing image features", "done": done, "of": 5})
            time.sleep(0.15)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"  computing image features: {done} of 5" for done in (2, 4)]

"""The tutorial, docs/finetune.md: its commands run in order, word for word."""

import csv
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from cn_clip.cli import run

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "docs" / "finetune.md", ROOT / "docs" / "zh" / "finetune.md")
STEP = re.compile(r"^<!-- tutorial: (\w+) -->\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def steps():
    return {name: block.splitlines() for name, block in STEP.findall(PAGES[0].read_text("utf-8"))}


def execute(command, monkeypatch):
    """Run a line of a shell in this process; return its exit code."""
    program, *arguments = shlex.split(command)
    if program == "cd":
        monkeypatch.chdir(arguments[0])
        return 0
    if program == "python":
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
        return 0
    assert program == "cn-clip"
    return run(arguments)


def shorten(path, count, encoding):
    """Keep the first rows of a table, and write it in an encoding."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.reader(stream))
    with path.open("w", encoding=encoding, newline="") as stream:
        csv.writer(stream).writerows(rows[: count + 1])


@pytest.fixture
def step(tmp_path, monkeypatch, capsys):
    """Run the commands of a step of the tutorial; return what they print."""
    monkeypatch.chdir(tmp_path)

    def follow(name, *, table="products.csv"):
        for command in steps()[name]:
            line = command.replace(" products.csv", f" {shlex.quote(table)}")
            assert execute(line, monkeypatch) == 0, line
        return capsys.readouterr().out

    return follow


def test_the_tutorial_runs_on_a_few_products(step):
    step("shop")
    shorten(Path("products.csv"), 16, "utf-8-sig")
    printed = {name: step(name) for name in steps() if name != "shop"}
    assert re.search(r"train +1\d ", printed["split"])
    assert "R@1" in printed["before"] and "R@1" in printed["after"]
    assert "photos/" in printed["search"]
    assert Path("run/report.html").exists() and Path("check.html").exists()
    with np.load("products.npz") as stored:
        assert len(stored["ids"]) == 16
        assert json.loads(str(stored["about"]))["model"]


def test_the_tutorial_reads_a_table_that_excel_saved_in_chinese_windows(step, capsys):
    table = "csv:products.csv?encoding=gb18030"
    assert table in PAGES[0].read_text("utf-8")
    step("shop")
    shorten(Path("products.csv"), 28, "gbk")
    assert run(["data", "check", "products.csv"]) == 1
    assert f'give "{table}"' in " ".join(capsys.readouterr().out.split())
    assert re.search(r"captions in Chinese +28", step("check", table=table))
    step("split", table=table)
    assert "台灯" in Path("split/train.csv").read_text("utf-8-sig")


@pytest.mark.full
def test_the_whole_tutorial_gains_what_it_says(step):
    printed = {name: step(name) for name in steps()}
    recall = {
        name: float(re.search(r"mean recall\D*([\d.]+)", printed[name])[1])
        for name in ("before", "after")
    }
    assert recall["after"] > recall["before"] + 5


def test_both_languages_have_the_same_commands_and_outputs():
    blocks = [FENCE.findall(page.read_text("utf-8")) for page in PAGES]
    assert blocks[0] == blocks[1]

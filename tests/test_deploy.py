"""The files of ``deploy/``, against the package that they run."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from cn_clip.cli import run
from cn_clip.serve.metrics import Metrics

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


def names(requirements):
    return {re.split(r"[<>=;\[ ]", line)[0].lower() for line in requirements}


def test_the_requirements_of_the_image_are_those_of_a_server_without_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["serve"] + extras["search"] + extras["onnx"]
    lines = (DEPLOY / "requirements.txt").read_text().splitlines()
    listed = [line for line in lines if line[0] not in "#-"]
    assert names(listed) == names(wanted) - {"torch"} | {"pyarrow"}
    assert listed == sorted(listed, key=str.lower)


def test_every_metric_of_the_dashboard_exists():
    metrics = Metrics()
    metrics.request("/v1/embeddings", "POST", 200, 0.1)
    metrics.batch("texts", 1, 0.1)
    metrics.cache.labels("hit").inc()
    metrics.inside.labels("texts").set(0)
    served = set(re.findall(r"^(cnclip_\w+)", metrics.render().decode(), re.MULTILINE))
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for query in queries for name in re.findall(r"cnclip_\w+", query)}
    assert used and used <= served


def commands():
    """Yield the arguments of ``cn-clip`` in each file."""
    docker = (DEPLOY / "Dockerfile").read_text()
    yield json.loads(re.search(r"^CMD (.*)$", docker, re.MULTILINE)[1])
    for line in re.findall(r"command: \[(.*)\]", (DEPLOY / "compose.yaml").read_text()):
        yield [part.strip() for part in line.split(",")]
    unit = (DEPLOY / "cn-clip.service").read_text()
    yield shlex.split(re.search(r"^ExecStart=\S+ (.*)$", unit, re.MULTILINE)[1])


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_is_one_that_the_command_line_takes(words, capsys):
    assert run([*words, "--no-such-option"]) == 2  # the only fault
    assert "--no-such-option" in capsys.readouterr().err


def test_the_image_does_not_run_as_root():
    last_stage = (DEPLOY / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    assert re.search(r"^USER [1-9]\d*$", last_stage, re.MULTILINE)


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not installed")
def test_hadolint_has_nothing_to_say():
    done = subprocess.run(["hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

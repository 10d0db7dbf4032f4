"""The commands of docs/troubleshooting.md run word for word, each section in its own folder."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import TINY, make_model

from cn_clip import hub, weights
from cn_clip.cli import run
from cn_clip.data.pack import pack
from cn_clip.data.sources.open import open_source
from cn_clip.sample import embedded_sample

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"
SECTION = re.compile(r"^### (.*?)\n(.*?)(?=^##)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENDLESS = ("serve", "bench")  # the first never ends; the second takes minutes
SLOW = (" train ", " export ")


def sections():
    """Return the commands of each section that has some."""
    text = PAGE.read_text("utf-8")
    blocks = {title: "".join(BLOCK.findall(body)) for title, body in SECTION.findall(text)}
    return {title: block.splitlines() for title, block in blocks.items() if block}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with what the commands read."""
    root = tmp_path_factory.mktemp("place")
    (root / "photos").mkdir()
    sample = embedded_sample()
    for image in sample.images:
        shutil.copy(image, root / "photos")
    pairs = zip(sample.images, sample.captions, strict=True)
    rows = [f"photos/{image.name},{caption}" for image, caption in pairs]
    (root / "split").mkdir()
    tables = {"products": rows, "train": rows[:16], "val": rows[16:]}
    tables |= {"split/test": rows, "split/val": rows}
    for name, lines in tables.items():
        up = "../" if "/" in name else ""
        text = "\n".join(["image,caption", *(up + line for line in lines)])
        (root / f"{name}.csv").write_text(text + "\n", encoding="utf-8")
    products = open_source(f"csv:{root}/products.csv")
    (root / "MUGE").mkdir()
    pack(products, root / "MUGE" / "lmdb" / "train", to="lmdb")
    pack(products, root / "tsv", to="tsv", split="valid")
    for written in (root / "tsv").glob("valid_*"):
        written.rename(root / "MUGE" / written.name)
    model = make_model(TINY["vit"])
    for name in ("epoch_latest.pt", "clip_cn_vit-b-16.pt"):
        weights.save_official(model, root / name)
    shutil.copytree(hub.EMBEDDED_FOLDER, root / "result")
    return root


def parameters():
    """Return the titles of the sections; some take longer than a quick test may."""
    return [
        pytest.param(title, marks=pytest.mark.full if slow else ())
        for title, lines in sections().items()
        for slow in [any(word in line for word in SLOW for line in lines)]
    ]


@pytest.mark.parametrize("title", parameters())
@pytest.mark.usefixtures("tiny_vit_b_16")
def test_the_commands_of_a_section_run(title, place, tmp_path, monkeypatch, capsys):
    lines = [line for line in sections()[title] if line.split()[1] not in ENDLESS]
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    if "run/final" in " ".join(lines):
        (tmp_path / "run").mkdir()
        shutil.move(tmp_path / "result", tmp_path / "run" / "final")
    if any(" data split " in line for line in lines):
        shutil.rmtree(tmp_path / "split")  # the command makes it
    monkeypatch.chdir(tmp_path)
    for line in lines:
        assert run(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr().err}"


def test_most_sections_with_a_command_are_run():
    assert len(sections()) >= 15
    assert json.dumps(sections()).count("cn-clip ") >= 20

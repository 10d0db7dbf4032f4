"""Commands, output, links and help texts in the docs are up to date."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import TINY, make_model

from cn_clip import tokenizer, weights
from cn_clip.cli import run

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
READMES = (ROOT / "README.md", ROOT / "README.zh.md")
GUIDES = (DOCS / "guide.md", DOCS / "zh" / "guide.md")
TRAINING = (DOCS / "training.md", DOCS / "zh" / "training.md")
COMING = (DOCS / "migrating.md", DOCS / "zh" / "migrating.md")
DATA = (DOCS / "data.md", DOCS / "zh" / "data.md")
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MARKED = re.compile(r"<!-- command: (\w+) -->\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PREDICTION = re.compile(r"^ *(\S+) +([\d.]+)% .*?(-?\d\.\d{3})$", re.MULTILINE)


def name_of(page):
    return str(page.relative_to(ROOT))


def read(page):
    return page.read_text(encoding="utf-8")


def code_in(page):
    """Return the code blocks without comments, which are translated."""
    return [
        (language, re.sub(r"(^|[ ]+)# .*$", "", block, flags=re.MULTILINE))
        for language, block in FENCE.findall(read(page))
    ]


def anchors_in(page):
    """Return the anchors of headings: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Return a folder for the code of a page, with the examples and a checkpoint."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    weights.save_official(make_model(TINY["vit"]), tmp_path / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer.default_tokenizer(), "truncated", 0)
    return tmp_path


@pytest.mark.parametrize("name", ["cli", "recipe"])
def test_generated_pages_are_up_to_date(name):
    page = runpy.run_path(str(DOCS / f"generate_{name}.py"))
    assert read(page["PAGE"]) == page["render"](), (
        f"docs/{name}.md is out of date; regenerate it: python docs/generate_{name}.py"
    )


@pytest.mark.parametrize("page", TRAINING, ids=name_of)
def test_the_commands_of_the_training_page_are_valid(page, capsys):
    commands = [
        line.partition("train ")[2]
        for language, block in code_in(page)
        if language == "sh"
        for line in block.splitlines()
        if " train " in line
    ]
    assert len(commands) >= 4
    for command in commands:
        assert run(["train", *shlex.split(command), "--show", "recipe"]) == 0, command
        capsys.readouterr()


@pytest.mark.parametrize("page", TRAINING, ids=name_of)
def test_the_recipe_and_the_options_of_the_training_page_are_valid(page, tmp_path):
    (recipe,) = (block for language, block in code_in(page) if language == "toml")
    path = tmp_path / "mine.toml"
    path.write_text(recipe, encoding="utf-8")
    assert run(["train", "--recipe", str(path), "--show", "recipe"]) == 0
    options = re.findall(r"^\| `(--[^`]+)` \|", read(page), re.MULTILINE)
    assert len(options) >= 8
    for option in options:
        flags = shlex.split(option)
        assert run(["train", "--recipe", str(path), "--show", "recipe", *flags]) == 0, option


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_the_readme_has_one_command_to_try_and_one_to_test(readme):
    assert [name for name, _ in MARKED.findall(read(readme))] == ["demo", "test"]


@pytest.mark.parametrize(
    ("english", "chinese"),
    [READMES, GUIDES, COMING, DATA, TRAINING],
    ids=["README", "guide", "coming from", "data", "training"],
)
def test_both_languages_have_the_same_code(english, chinese):
    assert code_in(english) == code_in(chinese)


def test_the_readme_shows_what_its_command_prints(capsys, clone):
    demo = dict(MARKED.findall(read(READMES[0])))["demo"].splitlines()[-1]
    assert run([*shlex.split(demo)[1:], "--json"]) == 0
    (image,) = json.loads(capsys.readouterr().out)["images"]
    table = next(block for language, block in FENCE.findall(read(READMES[0])) if language == "text")
    rows = PREDICTION.findall(table)
    assert [label for label, _, _ in rows] == [row["label"] for row in image["predictions"]]
    for (_, probability, cosine), row in zip(rows, image["predictions"], strict=True):
        # Rounding differs between processors.
        assert abs(float(probability) / 100 - row["probability"]) < 0.01
        assert abs(float(cosine) - row["cosine"]) < 0.01


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_the_readme_table_matches_the_models_command(capsys, readme):
    assert run(["models", "--json"]) == 0
    listed = [
        (m["name"], f"{m['parameters'] / 1e6:.0f} M", str(m["resolution"]), str(m["dim"]))
        for m in json.loads(capsys.readouterr().out)["models"]
    ]
    rows = re.findall(r"^\| `(.+?)` \|.*\| (\d+ M) \| (\d+) \| (\d+) \|$", read(readme), re.M)
    assert rows == listed


def test_the_snippets_of_the_guide_run(clone):
    scope = {}
    assert run(["embed", "images", "examples/cat.jpg", "--out", "embeddings.npz"]) == 0
    for language, block in FENCE.findall(read(GUIDES[0])):
        if language == "python":
            exec(compile(block, "docs/guide.md", "exec"), scope)
    assert scope["images"].shape == (3, scope["images"].shape[1])
    assert list(scope["errors"]) == [1]
    assert scope["tokenizer"].truncated == 1


@pytest.mark.usefixtures("tiny_vit_b_16")
def test_the_examples_of_the_readme_run(clone, capsys):
    scope = {}
    official, short = (b for language, b in FENCE.findall(read(READMES[0])) if language == "python")
    exec(compile(official, "README.md", "exec"), scope)
    assert "Label probs: [[" in capsys.readouterr().out and scope["probs"].shape == (1, 4)
    exec(compile(short, "README.md", "exec"), scope)
    assert scope["result"].top(1)[0][0][0] == "猫"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_has_a_target(page):
    dead = []
    for link in LINK.findall(FENCE.sub("", read(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors_in(target)):
            dead.append(link)
    assert not dead, f"{name_of(page)} has dead links: {', '.join(dead)}"

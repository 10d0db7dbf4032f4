"""Every command in the docs has options that exist, and values of their types."""

import re
import shlex
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from cn_clip.cli import app, run

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENVIRONMENT = re.compile(r"^(?:[A-Z_]+=\S* )+")


def commands(page):
    """Yield the words of each `cn-clip` command in the shell blocks of a page."""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(ENVIRONMENT.sub("", line.strip()), comments=True)
            words = words[: next((n for n, w in enumerate(words) if w in ("|", "&&", ">")), None)]
            if words and words[0].endswith("cn-clip"):
                yield words[1:]


def invalid(words):
    """Return why a command line is invalid; None if it is valid."""
    if words[:1] == ["train"]:
        words = ["finetune-muge" if word.endswith(".toml") else word for word in words]
        if "--show" in words:
            at = words.index("--show")
            words = [*words[:at], *words[at + 2 :]]
        return None if run([*words, "--show", "recipe"]) == 0 else "the recipe is refused"
    try:
        app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_are_valid(page, capsys):
    reasons = {" ".join(words): reason for words in commands(page) if (reason := invalid(words))}
    assert not reasons, capsys.readouterr().err


def test_an_invalid_command_is_seen():
    assert invalid(["classify", "a.jpg", "--lables", "猫"])
    assert invalid(["data", "split", "a.csv"])
    assert invalid(["no-such-command"])
    assert not invalid(["classify", "a.jpg", "--labels", "猫,狗"])
    assert sum(len(list(commands(page))) for page in PAGES) > 100

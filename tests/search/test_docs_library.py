"""docs/library.md: the same commands in both languages, all of them, and all valid."""

import re
import shlex

from test_docs import DOCS, code_in, read

from cn_clip.cli import app, load_commands

ENGLISH, CHINESE = DOCS / "library.md", DOCS / "zh" / "library.md"


def test_both_languages_have_the_same_code_and_figures():
    assert code_in(ENGLISH) == code_in(CHINESE)
    figures = [re.findall(r"\d+\.\d+", read(page)) for page in (ENGLISH, CHINESE)]
    assert sorted(figures[0]) == sorted(figures[1])


def test_the_table_has_every_command():
    load_commands()
    commands = {name for name in app["library"] if not name.startswith("-")}
    for page in (ENGLISH, CHINESE):
        assert set(re.findall(r"^\| `([a-z-]+)", read(page), re.MULTILINE)) >= commands


def test_the_commands_of_the_page_are_valid():
    lines = [line for _, block in code_in(ENGLISH) for line in block.splitlines() if line.strip()]
    assert len(lines) >= 12
    for line in lines:
        name, *words = shlex.split(line.replace("\\", "/"))
        assert name == "cn-clip"
        app.parse_args(words, exit_on_error=False, print_error=False)

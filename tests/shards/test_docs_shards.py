"""docs/shards.md and docs/billion.md: code the same in both languages, figures as computed."""

import re
import runpy
import shlex

import pytest
from test_docs import DOCS, code_in, read

from cn_clip.cli import app, load_commands

SHARDS = (DOCS / "shards.md", DOCS / "zh" / "shards.md")
BILLION = runpy.run_path(str(DOCS / "generate_billion.py"))


def test_both_languages_have_the_same_code_and_figures():
    assert code_in(SHARDS[0]) == code_in(SHARDS[1])
    figures = [sorted(re.findall(r"\d+\.\d+", read(page))) for page in SHARDS]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("page", SHARDS, ids=["en", "zh"])
def test_every_option_in_the_commands_of_the_page_exists(page):
    load_commands()
    commands = [
        shlex.split(line, comments=True)
        for language, block in code_in(page)
        for line in block.splitlines()
        if language == "sh" and "cn-clip " in line and "pip" not in line
    ]
    assert len(commands) >= 12
    for words in commands:
        words = words[words.index("cn-clip") + 1 :]
        group, at = app, 0
        while at < len(words) and words[at] in [*group]:
            group, at = group[words[at]], at + 1
        known = {name for each in group.assemble_argument_collection() for name in each.names}
        given = {word for word in words[at:] if word.startswith("--")}
        assert words[0] == "train" or given <= known, words


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_of_a_billion_is_up_to_date(language):
    page = BILLION["render"](language)
    assert "@" not in re.sub(r"recall@10", "", page), "a value of the template is unknown"
    assert read(BILLION["PAGES"][language]) == page, (
        "docs/billion.md is out of date: python docs/generate_billion.py"
    )


def test_what_is_said_of_a_billion_follows_from_what_was_measured():
    values = BILLION["values"]()
    small, large = (dict(values["index"][name]) for name in ("small", "large"))
    # Seen from the larger one, the search of as many images is that of the larger one itself.
    values["images"] = values["images"] | {"count": large["rows"]}
    same = BILLION["search"](values)
    assert abs(same["probes"] - large["probes"]) < 1e-6
    assert abs(same["query_ms"] - large["query_ms"]) < 0.02 * large["query_ms"]
    assert abs(same["build_hours"] * 3600 - large["build_core_seconds"]) < 1
    assert large["probes"] / small["probes"] == pytest.approx(10 ** same["power"], rel=0.01)
    for index in (small, large):
        assert index["recall"] >= 0.95 and index["lists"] == round(2 * index["rows"] ** 0.5)


@pytest.mark.full
def test_operations_are_those_that_torch_counts():
    from cn_clip.config import MODELS
    from cn_clip.hub import EMBEDDED_FOLDER
    from cn_clip.train.cost import tower_operations
    from cn_clip.weights import read_config

    values = BILLION["values"]()
    configs = {"mini": read_config(EMBEDDED_FOLDER)} | MODELS
    for name, model in values["models"].items():
        _model, image, text = tower_operations(configs[name], values["images"]["text_tokens"])
        assert model["dim"] == configs[name].embed_dim
        assert model["image"] == pytest.approx(image / 1e9, abs=0.006)
        assert model["text"] == pytest.approx(text / 1e9, abs=0.006)

"""docs/search.md: code the same in both languages, and true."""

import re
import shutil

from conftest import TINY, make_model
from test_docs import DOCS, FENCE, ROOT, code_in, read

import cn_clip
from cn_clip import cli
from cn_clip.embedder import Embedder
from cn_clip.search.query import MAX_WEIGHT, MIN_WEIGHT, parse_query

ENGLISH, CHINESE = DOCS / "search.md", DOCS / "zh" / "search.md"


def test_both_languages_have_the_same_code_and_figures():
    assert code_in(ENGLISH) == code_in(CHINESE)
    figures = [re.findall(r"\d+\.\d+", read(page)) for page in (ENGLISH, CHINESE)]
    assert sorted(figures[0]) == sorted(figures[1])


def test_the_snippets_run(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CN_CLIP_LIBRARIES", str(tmp_path / "libraries"))
    assert cli.run(["index", "examples", "--exclude", "web"]) == 0
    monkeypatch.setattr(cn_clip, "load", lambda: Embedder.from_model(make_model(TINY["vit"])))
    scope = {}
    for language, block in FENCE.findall(read(ENGLISH)):
        if language == "python":
            exec(compile(block, "docs/search.md", "exec"), scope)
    assert [(term.text, term.weight) for term in scope["query"].terms] == [
        ("猫", 2),
        ("室内", -1),
        ("海边", 1),
    ]


def test_what_the_page_calls_one_phrase_is_one():
    for page in (ENGLISH, CHINESE):
        (paragraph,) = re.findall(r"[^\n]*\n[^\n]*`T-恤`(?:.|\n)*?\n\n", read(page))
        phrases = re.findall(r"`([^`]+)`", paragraph.partition("`C++`")[0])
        assert len(phrases) >= 5
        for phrase in [*phrases, "C++", 'a sign that says "welcome" in red']:
            assert [term.text for term in parse_query(phrase).terms] == [phrase]
    assert f"{MIN_WEIGHT:g} to {MAX_WEIGHT:g}" in read(ENGLISH)

"""docs/diagnosis.md, docs/research/flickr30k-gap.md: the same code in both languages, and true."""

import re

import pytest
from test_docs import DOCS, code_in, read

from cn_clip.cli import app
from cn_clip.eval.robustness.rewrites import all_rewrites
from cn_clip.normalize import NORMALIZERS


@pytest.mark.parametrize("page", ["diagnosis.md", "research/flickr30k-gap.md"])
def test_both_languages_hold_the_same_code_and_figures(page):
    english, chinese = DOCS / page, DOCS / "zh" / page
    assert code_in(english) == code_in(chinese)
    figures = [re.findall(r"\d+\.\d+", read(each)) for each in (english, chinese)]
    assert sorted(figures[0]) == sorted(figures[1])


def test_the_page_names_every_rewrite_and_normalizer():
    page = read(DOCS / "diagnosis.md")
    for name in [*(rewrite.name for rewrite in all_rewrites()), *NORMALIZERS]:
        assert f"`{name}`" in page, name


def test_the_normalizer_does_what_the_page_says():
    pytest.importorskip("opencc")
    (snippet,) = (code for _, code in code_in(DOCS / "diagnosis.md") if "normalized" in code)
    exec(compile(snippet, "docs/diagnosis.md", "exec"), {})


@pytest.mark.parametrize("page", ["diagnosis.md", "research/flickr30k-gap.md"])
def test_the_options_of_its_commands_exist(page):
    for language, block in code_in(DOCS / page):
        for line in block.splitlines() if language == "sh" else ():
            words = line.split()
            if words[:2] == ["cn-clip", "eval"]:
                app.parse_args(words[1:], print_error=False, exit_on_error=False)

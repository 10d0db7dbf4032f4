"""Templates of the HTML reports: text is escaped, and a missing value is an error."""

from pathlib import Path

import pytest
from jinja2 import UndefinedError

import cn_clip
from cn_clip.data.curate.check import CheckResult
from cn_clip.html.page import write_page

PACKAGE = Path(cn_clip.__file__).parent
TEMPLATES = sorted(PACKAGE.rglob("*report.html"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.parent.name)
def test_a_report_extends_the_frame_and_turns_escaping_off_nowhere(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith('{% extends "html/page.html" %}')
    assert "safe" not in text and "autoescape" not in text


def test_text_is_escaped_and_a_name_that_is_not_utf_8_is_written(tmp_path):
    result = CheckResult("<script>&\"'\udcd6", context_length=52)
    values = {"kinds": {}, "max_shown": 0, "images": None}
    template = "data/curate/check_report.html"
    path = tmp_path / "x.html"
    write_page(path, template, result.source, "data check", result=result, **values)
    html = path.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    for tag in ("title", "h1"):
        assert f"<{tag}>&lt;script&gt;&amp;&#34;&#39;%D6</{tag}>" in html


def test_a_value_that_a_template_lacks_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(UndefinedError, match="result"):
        write_page(tmp_path / "x.html", "data/curate/check_report.html", "t", "data check")
    assert list(tmp_path.iterdir()) == []

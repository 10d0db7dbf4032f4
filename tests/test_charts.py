"""Charts of pages: round ticks, titles, and pages that are replaced in any language."""

import re
from collections import Counter

import numpy as np
import pytest

from cn_clip.errors import UsageError
from cn_clip.html import page
from cn_clip.html.charts import Axis, histogram, number, overlaid_histograms, round_ticks
from cn_clip.html.page import claim_page


@pytest.mark.parametrize("low", [-3.2, 0, 1e-7, 24.013, 58.3])
@pytest.mark.parametrize("width", [1e-6, 0.03, 1, 32.5, 1e5])
def test_ticks_are_round_cover_the_range_and_are_few(low, width):
    ticks = round_ticks(low, low + width)
    assert ticks[0] <= low + 1e-9 * width and low + width <= ticks[-1] + 1e-9 * width
    assert 3 <= len(ticks) <= 8
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0])
    assert f"{steps[0]:.0e}"[0] in "125"


def test_a_range_of_one_value_has_ticks():
    axis = Axis.of(7, 7, "")
    assert axis.low < 7 < axis.high


def test_numbers_at_ticks():
    assert [number(n) for n in (0, 1200, 0.05, 2e-5, -0.5)] == [
        "0",
        "1,200",
        "0.05",
        "2e-05",
        "-0.5",
    ]


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize("values", [[3], [0, 0, 1], range(500), [5] * 1000 + [4000]])
def test_a_histogram_has_all_counts_and_titles(values):
    svg = histogram(Counter(values), 4, "tokens", "captions", 52)
    told = [int(count.replace(",", "")) for count in re.findall(r": ([\d,]+)</title>", svg)]
    assert sum(told) == len(values)
    assert {"tokens", "captions", "0"} <= set(texts(svg))
    assert ('class="cut"' in svg) == (max(values) > 56)


def test_overlaid_histograms_have_their_units():
    edges = np.linspace(-1, 1, 201)
    ours, others = np.zeros(200, np.int64), np.zeros(200, np.int64)
    ours[150], others[90:110] = 5, 7
    assert {"cosine", "share, %", "0", "100"} <= set(
        texts(overlaid_histograms(ours, others, edges))
    )


def test_a_page_in_another_language_is_replaced_too(tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    monkeypatch.setattr(page, "shown_language", lambda: "zh-CN")
    path.write_text(page._start("data check"))
    assert path.read_text().startswith('<!doctype html>\n<html lang="zh-CN"><head>')
    monkeypatch.undo()
    claim_page(path, "data check")
    with pytest.raises(UsageError, match="was not written by `cn-clip train`"):
        claim_page(path, "train")

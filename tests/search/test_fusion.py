"""Fusion of image ranking and text hits; the oracle is the order a person expects."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cn_clip.errors import UsageError
from cn_clip.search.fusion import WEIGHT, TextMatch, fuse, match_text


def strength(query, text):
    match = match_text(query, text)
    return 0.0 if match is None else match.strength


@pytest.mark.parametrize(
    ("query", "stronger", "weaker"),
    [
        ("营业中", "营业中", "暂停营业"),
        ("营业中", "营业中", "营业中 电话12345678"),
        ("写着“营业中”的牌子", "营业中", "牌子和别的许多字"),
        ("禁止吸烟", "禁止吸烟", "禁止停车"),
        ("禁止吸烟", "前面\n禁止吸烟\n后面", "前面禁止别的吸烟后面"),
        ("禁止吸烟", "禁止吸煙咽", "吸烟"),
        ("小心地滑", "小心\n地滑", "小心"),
        ("大熊猫", "大熊猫火锅城", "熊"),
        ("禁止吸烟", "禁止吸烟", "吸烟有害健康"),
        ("安全出口 exit", "安全出口 EXIT", "exit"),
        ("13812345678", "电话：13812345678", "电话：138"),
        ("a red apple", "RED APPLE", "A"),
    ],
)
def test_a_text_with_more_of_the_query_is_stronger(query, stronger, weaker):
    assert 1 >= strength(query, stronger) > strength(query, weaker)


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("一只猫", "猫"),
        ("一只猫", "只有一"),
        ("a cat", "A"),
        ("5 apples", "5"),
        ("猫", "狗"),
        ("猫", ""),
        ("", "猫"),
        ("!?", "!?"),
    ],
)
def test_what_matches_by_chance_is_no_match(query, text):
    assert match_text(query, text) is None


@settings(max_examples=200, deadline=None)
@given(st.text(), st.text())
def test_any_text_matches_itself_best(query, text):
    assert 0 <= strength(query, text) <= strength(query, query) <= 1


def test_one_character_is_weaker_than_two_and_two_than_four():
    values = [strength(text, text) for text in ("猫", "熊猫", "禁止吸烟", "禁止吸烟禁止吸烟")]
    assert values == sorted(values) and values[0] < 0.5 and values[-1] > 0.95


def test_the_matching_line_is_shown_and_the_field_kept():
    match = match_text("吸烟", "第一行\n 请勿吸烟 \n第三行", "caption")
    assert (match.line, match.field) == ("请勿吸烟", "caption")


def ranking(*cosines):
    return np.arange(1, len(cosines) + 1), np.array(cosines, np.float32)


def test_without_text_hits_the_order_is_that_of_the_images():
    fused = fuse(*ranking(0.4, 0.3, 0.3, 0.1), {}, logit_scale=100)
    assert [hit.id for hit in fused] == [1, 2, 3, 4]
    assert all(hit.reasons == ("image",) and hit.match is None for hit in fused)
    assert [hit.cosine for hit in fused] == pytest.approx([0.4, 0.3, 0.3, 0.1])


def test_a_full_text_match_wins_and_a_weak_one_gives_way_to_a_clear_image():
    ids, cosines = ranking(0.45, 0.2, 0.19, 0.18)
    full = {4: TextMatch("text", "禁止吸烟", 1.0)}
    assert [h.id for h in fuse(ids, cosines, full, logit_scale=100)] == [4, 1, 2, 3]
    weak = {4: TextMatch("text", "吸", 0.1)}
    assert [h.id for h in fuse(ids, cosines, weak, logit_scale=100)] == [1, 4, 2, 3]


def test_the_score_is_the_sum_in_logits():
    fused = fuse(*ranking(0.3, 0.2), {2: TextMatch("caption", "x", 0.5)}, logit_scale=50)
    assert {hit.id: hit.score for hit in fused} == pytest.approx({1: 15, 2: 10 + 0.5 * WEIGHT})


def test_an_image_says_why_it_is_among_the_results():
    ids, cosines = ranking(0.5, 0.4, 0.3, 0.2)
    matches = {1: TextMatch("text", "猫", 0.9), 4: TextMatch("caption", "猫", 0.9)}
    fused = fuse(ids, cosines, matches, logit_scale=20, k=2)
    assert [(h.id, h.reasons) for h in fused] == [(1, ("text", "image")), (4, ("caption",))]
    assert fused[1].match.line == "猫"


def test_a_hit_outside_the_image_ranking_counts_as_its_last():
    fused = fuse(*ranking(0.5, 0.4), {9: TextMatch("text", "禁", 0.9)}, logit_scale=20)
    hit = next(h for h in fused if h.id == 9)
    assert hit.cosine is None and hit.reasons == ("text",)
    assert hit.score == pytest.approx(20 * 0.4 + 0.9 * WEIGHT)


def test_an_empty_ranking_has_the_text_hits():
    empty = np.empty(0, np.int64), np.empty(0, np.float32)
    assert fuse(*empty, {}, logit_scale=20) == []
    assert [h.id for h in fuse(*empty, {7: TextMatch("text", "x", 1.0)}, logit_scale=20)] == [7]


def test_ids_and_cosines_must_belong_together():
    with pytest.raises(UsageError, match=r"\(2,\) ids and \(3,\) cosines"):
        fuse(np.arange(2), np.zeros(3), {}, logit_scale=20)

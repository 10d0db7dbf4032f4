"""Tokens and match expressions in a real FTS5 table; the oracle is Python's ``in``."""

import random
import sqlite3

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cn_clip import normalize
from cn_clip.search import fulltext
from cn_clip.search.fulltext import TOKENIZER, fold, fold_version, match_expression, tokens


def table_of(texts):
    db = sqlite3.connect(":memory:")
    db.execute(f"CREATE VIRTUAL TABLE t USING fts5(text, tokenize = '{TOKENIZER}')")
    rows = [(n, tokens(text)) for n, text in enumerate(texts)]
    db.executemany("INSERT INTO t(rowid, text) VALUES (?, ?)", rows)
    return db


def hits(texts, query, **options):
    """Return the texts that a query finds, in order."""
    expression = match_expression(query, **options)
    if not expression:
        return []
    sql = "SELECT rowid FROM t WHERE t MATCH ? ORDER BY rowid"
    return [texts[n] for (n,) in table_of(texts).execute(sql, (expression,))]


def test_every_substring_of_chinese_characters_is_found_and_nothing_else():
    rng = random.Random(0)
    texts = ["".join(rng.choices("海边日落一只猫の红", k=rng.randint(1, 12))) for _ in range(200)]
    db = table_of(texts)
    queries = {
        "".join(rng.choices("海边日落一只猫の红", k=k)) for k in (1, 2, 3, 4) for _ in range(99)
    }
    queries |= {text[a : a + 3] for text in texts for a in range(len(text))}
    for query in queries:
        rows = db.execute("SELECT rowid FROM t WHERE t MATCH ?", (match_expression(query),))
        assert {n for (n,) in rows} == {n for n, text in enumerate(texts) if query in text}


@settings(max_examples=300, deadline=None)
@given(st.text(), st.text())
@example('AND OR NOT NEAR(a b) "', 'AND" OR text:*')
@example("a\x00b", "a\x00b")
@example("\ud83d", "\ud83d")
@example("", "")
@example("*", "*")
@example("^text : {a} + b - c", "^a")
def test_no_input_is_fts5_syntax(text, query):
    db = table_of([text])
    for partial in (False, True):
        expression = match_expression(query, partial=partial)
        assert bool(expression) == bool(fulltext.units(query))
        if expression:
            (count,) = db.execute(
                "SELECT count(*) FROM t WHERE t MATCH ?", (expression,)
            ).fetchone()
            assert count in (0, 1)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_a_text_finds_itself_if_it_has_a_letter(text):
    found = hits([text], text)
    assert found == ([text] if fulltext.units(text) else [])


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("猫", ["一只猫", "熊猫👍🏽"]),
        ("熊猫", ["熊猫👍🏽"]),
        ("👍", ["熊猫👍🏽"]),
        ("iphone15", ["iPhone 15手机"]),
        ("IPHONE15手", ["iPhone 15手机"]),
        ("15", ["iPhone 15手机"]),
        ("1", []),
        ("iph", ["iPhone 15手机"]),
        ("phone", []),
        ("cat", ["two cats", "concatenate a cat"]),
        ("cats", ["two cats"]),
        ("T恤", ["Ｔ-恤 ￥１９．９"]),
        ("t-恤", ["Ｔ-恤 ￥１９．９"]),
        ("19.9", ["Ｔ-恤 ￥１９．９"]),
        ("9.19", []),
        ("café", ["CAFE 营业中"]),
        ("营业 cafe", ["CAFE 营业中"]),
        ("营业 关门", []),
        ("安全出口", ["安 全\n出 口！"]),
        ("AND", []),
        ("cat AND two", []),
        ("cat two", ["two cats"]),
        ('"two"', ["two cats"]),
        ("two*", ["two cats"]),
        ("!!!", []),
        ("", []),
        ("  \n", []),
    ],
)
def test_a_query_finds_what_a_person_expects(query, expected):
    texts = ["一只猫", "熊猫👍🏽", "iPhone 15手机", "two cats", "concatenate a cat"]
    texts += ["Ｔ-恤 ￥１９．９", "CAFE 营业中", "安 全\n出 口！"]
    assert hits(texts, query) == expected


def test_a_partial_match_needs_two_neighbouring_characters_or_a_word():
    texts = ["禁止吸烟", "禁烟", "止吸", "吸", "no smoking", "123"]
    assert hits(texts, "写着禁止吸烟的牌子", partial=True) == ["禁止吸烟", "止吸"]
    assert hits(texts, "吸", partial=True) == ["禁止吸烟", "止吸", "吸"]
    assert hits(texts, "牌子 smoking", partial=True) == ["no smoking"]


def test_a_long_query_is_cut():
    assert match_expression("海边" * 5000).count(" ") <= fulltext.MAX_QUERY
    assert hits(["海边" * 500], "海边" * 400) == ["海边" * 500]


def test_traditional_and_simplified_find_each_other_with_opencc(monkeypatch):
    pytest.importorskip("opencc")
    texts = ["乾隆皇后的烏龜", "一只乌龟"]
    assert hits(texts, "乌龟") == hits(texts, "烏龜") == texts
    for start in range(len(texts[0])):  # 乾 alone is not converted as in 乾隆
        assert hits(texts, texts[0][start : start + 1])[0] == texts[0]
    assert fold_version() == "1+opencc"
    monkeypatch.setattr(fulltext, "have_opencc", lambda: False)
    assert hits(texts, "乌龟") == texts[1:] and fold_version() == "1"


@given(st.text(alphabet="乾隆後着烏龜猫Ａｂ１，。😀", max_size=8), st.text(alphabet="后乾猫Ａ"))
def test_folding_is_the_same_in_any_context(first, second):
    assert fold(first + second) == fold(first) + fold(second)
    assert fold(fold(first)) == fold(first)


def test_folding_needs_no_opencc(monkeypatch):
    monkeypatch.setattr(fulltext, "have_opencc", lambda: False)
    monkeypatch.setattr(normalize, "opencc_converter", None)
    assert fold("Ｃａｆé 貓") == "cafe 貓"

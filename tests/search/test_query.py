"""The language of queries against examples by hand, and its embedding against plain numpy."""

import re
import sys
import time
import unicodedata

import numpy as np
import pytest
from conftest import TINY, make_image, make_model
from hypothesis import given
from hypothesis import strategies as st

from cn_clip.embedder import Embedder
from cn_clip.errors import UsageError
from cn_clip.search.query import Query, Term, default_normalizers, embed_query, parse_query


def terms_of(text, **options):
    return [(term.text, term.weight) for term in parse_query(text, **options).terms]


@pytest.mark.parametrize(
    "text",
    [
        "海边的日落",
        "a red-haired girl",
        "T-恤 12:30",
        "T－恤 １２：３０",
        "-5度的冬天",
        "零下 -18 ℃",
        "−3 degrees",
        "12:30 的车站",
        "16:9 壁纸",
        "约翰福音 3:16",
        "猫 - 狗",
        "猫 -- 狗",
        "C++ 书",
        "+86 电话",
        "1+1=2",
        "+/-",
        "8-bit 游戏",
        "2: 猫",
        "注意：猫",
        "https://example.com/a-b",
        'a sign that says "welcome" in red',
        '他说 "-5 度 -冷" 的',
        '5" 屏幕',
        '"没有写完',
        "“你好”招牌",
        "“猫”和“狗”",
        'he said "it"s" twice',
        "-",
        ":-)",
        "猫，-狗",
    ],
)
def test_a_plain_sentence_is_one_phrase_unchanged(text):
    assert terms_of(text) == [(text, 1)]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("2:猫 -室内 海边", [("猫", 2), ("室内", -1), ("海边", 1)]),
        ('"2:猫" -"室内"', [("猫", 2), ("室内", -1)]),
        ("２：猫　－“室内 灯光”", [("猫", 2), ("室内 灯光", -1)]),
        ("2:a red cat -hat", [("a red cat", 2), ("hat", -1)]),
        ("dog +red ball -blue", [("dog", 1), ("red ball", 1), ("blue", -1)]),
        ("a dog -living room", [("a dog", 1), ("living", -1), ("room", 1)]),
        ('a dog -"living room" at night', [("a dog", 1), ("living room", -1), ("at night", 1)]),
        ("-2:室内 猫", [("室内", -2), ("猫", 1)]),
        ('-"2:室内" 0.5:猫', [("室内", -2), ("猫", 0.5)]),
        ("1e1:猫 .5:狗", [("猫", 10), ("狗", 0.5)]),
        ('"红车" "蓝天"', [("红车", 1), ("蓝天", 1)]),
        ('"红 车"', [("红 车", 1)]),
        ("“-室内”", [("-室内", 1)]),
        ('1:"2001：太空漫游"', [("2001：太空漫游", 1)]),
        ("猫 -🐱 −（黑白）", [("猫", 1), ("🐱", -1), ("（黑白）", -1)]),
        ("T-恤 -黑色", [("T-恤", 1), ("黑色", -1)]),
        ("  猫 \n -狗\t", [("猫", 1), ("狗", -1)]),
    ],
)
def test_signs_weights_and_quotes(text, terms):
    assert terms_of(text) == terms


def test_arguments_of_a_command_line_are_one_query():
    assert terms_of(["2:猫", "-室内"]) == terms_of("2:猫 -室内")
    assert terms_of(["a", "red", "cat", "-hat"]) == terms_of("a red cat -hat")
    # The shell removes the quotes of -"living room".
    assert terms_of(["a dog", "-living room", "at night"]) == [
        ("a dog", 1),
        ("living room", -1),
        ("at night", 1),
    ]
    assert terms_of(["猫", "-2:living room"]) == [("猫", 1), ("living room", -2)]
    assert terms_of(["猫", "-室内 +海边"]) == terms_of("猫 -室内 +海边")
    assert terms_of(["猫", '-"室内" 海边']) == terms_of('猫 -"室内" 海边')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ([], "empty"),
        (" \u3000\n", "empty"),
        ('""', "empty"),
        ('猫 -"  "', "empty"),
        ("-猫", "only what to avoid"),
        ("-猫 -2:狗", "only what to avoid"),
        (["-living room", "-猫"], "only what to avoid"),
        ("0:猫", "weight 0 "),
        ("0.001:猫", "weight 0.001 "),
        ("2001：太空漫游", "weight 2001 "),
        ("1e99:猫", "weight 1e99 "),
        ("-9999:狗 猫", "weight 9999 "),
        ("nan:猫", "weight nan "),
        ("inf:猫", "weight inf "),
        ("1,5:猫", "weight 1,5 "),
        ("1.2.3:猫", "weight 1.2.3 "),
        ('"101:猫"', "weight 101 "),
        ('猫 -"室内', "not closed"),
    ],
)
def test_an_invalid_query_is_refused_with_the_reason(text, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        parse_query(text)


def test_the_remedy_of_a_refused_weight_works():
    with pytest.raises(UsageError, match='1:"2001:…"'):
        parse_query("2001:太空漫游")
    assert terms_of('1:"2001:太空漫游"') == [("2001:太空漫游", 1)]


def test_images_and_ids_have_signs_and_weights():
    image = make_image()
    query = parse_query("-室内", images=["-2:a.jpg", "./2:b.jpg", image], like=[3, "0.5:17", "-4"])
    assert query.terms == (Term("室内", -1),)
    assert query.images == (("a.jpg", -2), ("./2:b.jpg", 1), (image, 1))
    assert query.like == ((3, 1), (17, 0.5), (4, -1))
    assert parse_query(images="-2:a.jpg", like=[1]).images == (("a.jpg", -2),)
    with pytest.raises(UsageError, match="only what to avoid"):
        parse_query(images=["-a.jpg"])
    for reference in ("x", 0, "-0", "1.5", "", "²"):
        with pytest.raises(UsageError, match="id of an image"):
            parse_query(like=[reference])


@given(st.text(max_size=60))
def test_any_text_is_a_query_or_a_usage_error_and_no_letter_is_lost(text):
    try:
        query = parse_query(text)
    except UsageError:
        return
    assert all(term.text == term.text.strip() != "" for term in query.terms)
    if ":" not in unicodedata.normalize("NFKC", text):
        kept = "".join(term.text for term in query.terms)
        assert [c for c in kept if c.isalnum()] == [c for c in text if c.isalnum()]


@given(st.lists(st.sampled_from('猫a-+2:"“”.， '), max_size=30))
def test_a_query_is_understood_the_same_again_from_how_it_is_shown(parts):
    try:
        query = parse_query("".join(parts))
    except UsageError:
        return
    if not any(quote in term.text for term in query.terms for quote in '"“”'):
        shown = str(Query((*query.terms, Term("x", 2))))  # one phrase is shown as it is
        assert parse_query(shown).terms[:-1] == query.terms


def test_a_long_query_takes_linear_time():
    texts = ['"a ' * 50_000, "-2:" * 50_000, '-"a" ' * 20_000 + "b", '"a" ' * 30_000 + "b"]
    start = time.process_time()
    for text in texts:
        parse_query(text)
    assert time.process_time() - start < 5


@pytest.fixture(scope="module")
def embedder():
    return Embedder.from_model(make_model(TINY["vit"]))


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_the_embedding_is_the_weighted_sum_of_unit_embeddings(embedder):
    cat, room = embedder.embed_texts(["猫", "室内"])
    image = embedder.embed_images([make_image(3)])[0]
    stored = unit(np.arange(embedder.dim) - 7.0).astype(np.float16)
    query = parse_query("2:猫 -室内", images=[make_image(3)], like=["0.5:9"])
    result = embed_query(embedder, query, vector_of={9: stored}.__getitem__)
    expected = unit(2 * cat - room + image + 0.5 * stored.astype(np.float32))
    assert result.dtype == np.float32 and result.shape == (embedder.dim,)
    np.testing.assert_allclose(result, expected, atol=1e-6)
    np.testing.assert_allclose(embed_query(embedder, parse_query("猫")), cat, atol=1e-7)


def test_phrases_are_normalised_before_embedding(embedder):
    result = embed_query(embedder, parse_query("ｃａｔ"))
    np.testing.assert_allclose(result, embedder.embed_texts("cat")[0], atol=1e-7)
    plain = embed_query(embedder, parse_query("ｃａｔ"), normalizers=())
    np.testing.assert_allclose(plain, embedder.embed_texts("ｃａｔ")[0], atol=1e-7)


def test_traditional_characters_find_the_same_as_simplified(embedder):
    pytest.importorskip("opencc")
    assert "simplified" in default_normalizers()
    result = embed_query(embedder, parse_query("一隻貓"))
    np.testing.assert_allclose(result, embedder.embed_texts("一只猫")[0], atol=1e-7)


def test_without_opencc_queries_are_only_in_one_width(embedder, monkeypatch):
    monkeypatch.setitem(sys.modules, "opencc", None)
    assert default_normalizers() == ("nfkc",)
    result = embed_query(embedder, parse_query("一隻貓，ｃａｔ"))
    np.testing.assert_allclose(result, embedder.embed_texts("一隻貓,cat")[0], atol=1e-7)


def test_terms_that_cancel_each_other_are_refused(embedder):
    with pytest.raises(UsageError, match="cancel each other"):
        embed_query(embedder, parse_query("猫 -猫"))


def test_an_id_without_an_embedding_is_refused(embedder):
    query = parse_query(like=[5])
    with pytest.raises(UsageError, match="image 5 has no embedding"):
        embed_query(embedder, query)
    with pytest.raises(UsageError, match="image 5 has no embedding"):  # purged: a row of zeros
        embed_query(embedder, query, vector_of=lambda _id: np.zeros(embedder.dim, np.float16))

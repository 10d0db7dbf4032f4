"""Other ways to ask, against examples written by hand and against what they promise."""

import sys
import unicodedata

import pytest

from cn_clip.errors import UsageError
from cn_clip.eval.robustness import rewrites as queries
from cn_clip.tokenizer import default_tokenizer


def test_characters_and_words_are_those_of_the_place():
    pytest.importorskip("opencc")
    assert queries.traditional("一只乌龟。") == "一隻烏龜。"
    assert queries.simplified("一隻烏龜。") == "一只乌龟。"
    assert queries.taiwan("自行车和打印机") == "腳踏車和印表機"
    assert queries.simplified("皇后") == queries.simplified("皇后")


def test_without_opencc_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "opencc", None)
    queries._opencc.cache_clear()
    assert not queries.have_opencc()
    with pytest.raises(UsageError, match=r"pip install 'cn-clip\[eval\]'"):
        queries.normalized("乌龟", ["nfkc", "simplified"])
    queries._opencc.cache_clear()


def test_width_changes_and_comes_back():
    assert queries.full_width("Tux 3号!") == "Ｔｕｘ ３号！"
    assert queries.half_width("Ｔｕｘ ３号！") == "Tux 3号!"
    assert queries.half_width("白孔雀（雌）、“雄”。") == '白孔雀(雌),"雄".'
    text = "".join(map(chr, range(0x20, 0x7F)))
    assert queries.half_width(queries.full_width(text)) == text
    assert unicodedata.normalize("NFKC", queries.full_width(text)) == text


def test_punctuation_goes_and_a_full_stop_comes():
    assert queries.without_punctuation("狗，猫。") == "狗猫"
    assert queries.without_punctuation("hot-air balloon!") == "hot air balloon"
    assert queries.without_punctuation("。") == "。"  # a query of nothing is none
    assert queries.with_full_stop("狗") == "狗。"
    assert queries.with_full_stop("狗！") == "狗！"


@pytest.mark.parametrize(
    ("text", "synonyms", "mixed", "english"),
    [
        ("猫", "猫咪", "cat", "cat"),
        ("一只猫。", "一只猫咪。", "一只cat。", "cat"),
        ("猫头鹰", "猫头鹰", "owl", "owl"),  # no cat in it
        ("热狗", "热狗", "热狗", "热狗"),  # no dog, and no word of the table
        ("狗和猫", "犬和猫咪", "dog和cat", "dog and cat"),
        ("两只红苹果", "两只红苹果", "两只红apple", "two red apple"),
        ("粉色自行车", "粉红色单车", "pink bicycle", "pink bicycle"),
        ("骑自行车的人", "骑单车的人", "骑bicycle的人", "骑自行车的人"),
        ("一棵松果树", "一棵松球树", "一棵pine cone树", "一棵松果树"),
        ("", "", "", ""),
    ],
)
def test_words_of_the_table_are_replaced_as_whole_words(text, synonyms, mixed, english):
    assert queries.with_synonyms(text) == synonyms
    assert queries.mixed(text) == mixed
    assert queries.english(text) == english


def test_the_table_holds_every_word_once_and_no_empty_row():
    table = queries._table()
    raw = queries.files("cn_clip").joinpath("eval/words.tsv").read_text(encoding="utf-8")
    assert len(table) == sum(bool(line) and line[0] != "#" for line in raw.splitlines()) > 300
    for word, (synonym, name) in table.items():
        assert word and name and word != synonym
        assert name == name.strip() and name.isascii()


@pytest.mark.parametrize("limit", [12, 52, 128])
@pytest.mark.parametrize(
    "text", ["猫头鹰。", "一只猫在看书，另一只在睡觉。", "a photo of a cat 猫"]
)
def test_long_texts_end_where_they_should(text, limit):
    tokenizer = default_tokenizer()
    own = tokenizer.encode(text, 1000)[0][1:-1]
    long = [tokenizer.encode(each, 1000)[0][1:-1] for each in (
        queries.padded_behind(text, context_length=limit),
        queries.padded_in_front(text, context_length=limit),
        queries.padded_in_front(text, context_length=limit, cut=True),
    )]  # fmt: skip
    room = limit - 2
    if len(own) <= room:
        assert len(long[0]) == room + 1 and long[0][: len(own)] == own
        assert len(long[1]) == room and long[1][-len(own) :] == own
        assert long[2][:room][-(len(own) // 2) :] == own[: len(own) // 2]
    else:
        assert queries.padded_behind(text, context_length=limit) == text
        assert queries.padded_in_front(text, context_length=limit) == text


def test_no_normaliser_is_on_unless_it_is_named():
    assert queries.normalized("ｃａｔ，猫", []) == "ｃａｔ，猫"
    assert queries.normalized("ｃａｔ，猫", ["nfkc"]) == "cat,猫"
    with pytest.raises(UsageError, match=r"unknown normaliser 'nfcd'; did you mean nfkc"):
        queries.normalized("猫", ["nfcd"])

"""Rewrites against examples by hand and against their definition."""

import re
import sys
import unicodedata

import pytest

from cn_clip import normalize
from cn_clip.errors import UsageError
from cn_clip.eval.robustness import rewrites
from cn_clip.install import install_command
from cn_clip.tokenizer import default_tokenizer


def test_characters_and_words_are_those_of_the_region():
    pytest.importorskip("opencc")
    assert rewrites.traditional("一只乌龟。") == "一隻烏龜。"
    assert rewrites.simplified("一隻烏龜。") == "一只乌龟。"
    assert rewrites.taiwan("自行车和打印机") == "腳踏車和印表機"
    assert rewrites.simplified("皇后") == rewrites.simplified("皇后")


def test_without_opencc_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "opencc", None)
    normalize.opencc_converter.cache_clear()
    assert not normalize.have_opencc()
    with pytest.raises(UsageError, match=re.escape(install_command("eval"))):
        normalize.normalized("乌龟", ["nfkc", "simplified"])
    normalize.opencc_converter.cache_clear()


def test_width_round_trips():
    assert rewrites.full_width("Tux 3号!") == "Ｔｕｘ ３号！"
    assert rewrites.half_width("Ｔｕｘ ３号！") == "Tux 3号!"
    assert rewrites.half_width("白孔雀（雌）、“雄”。") == '白孔雀(雌),"雄".'
    text = "".join(map(chr, range(0x20, 0x7F)))
    assert rewrites.half_width(rewrites.full_width(text)) == text
    assert unicodedata.normalize("NFKC", rewrites.full_width(text)) == text


def test_punctuation_is_removed_and_a_full_stop_added():
    assert rewrites.without_punctuation("狗，猫。") == "狗猫"
    assert rewrites.without_punctuation("hot-air balloon!") == "hot air balloon"
    assert rewrites.without_punctuation("。") == "。"  # never empty
    assert rewrites.with_full_stop("狗") == "狗。"
    assert rewrites.with_full_stop("狗！") == "狗！"


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
def test_only_whole_words_of_the_table_are_replaced(text, synonyms, mixed, english):
    assert rewrites.with_synonyms(text) == synonyms
    assert rewrites.mixed(text) == mixed
    assert rewrites.english(text) == english


def test_the_table_has_distinct_words_and_no_empty_row():
    table = rewrites._table()
    raw = (
        rewrites.files("cn_clip").joinpath("eval/robustness/words.tsv").read_text(encoding="utf-8")
    )
    assert len(table) == sum(bool(line) and line[0] != "#" for line in raw.splitlines()) > 300
    for word, (synonym, name) in table.items():
        assert word and name and word != synonym
        assert name == name.strip() and name.isascii()


@pytest.mark.parametrize("limit", [12, 52, 128])
@pytest.mark.parametrize(
    "text", ["猫头鹰。", "一只猫在看书，另一只在睡觉。", "a photo of a cat 猫"]
)
def test_padded_texts_end_at_the_limit(text, limit):
    tokenizer = default_tokenizer()
    own = tokenizer.encode(text, 1000)[0][1:-1]
    long = [tokenizer.encode(each, 1000)[0][1:-1] for each in (
        rewrites.padded_after(text, context_length=limit),
        rewrites.padded_before(text, context_length=limit),
        rewrites.padded_before(text, context_length=limit, cut=True),
    )]  # fmt: skip
    room = limit - 2
    if len(own) <= room:
        assert len(long[0]) == room + 1 and long[0][: len(own)] == own
        assert len(long[1]) == room and long[1][-len(own) :] == own
        assert long[2][:room][-(len(own) // 2) :] == own[: len(own) // 2]
    else:
        assert rewrites.padded_after(text, context_length=limit) == text
        assert rewrites.padded_before(text, context_length=limit) == text


def test_no_normalizer_is_applied_unless_named():
    assert normalize.normalized("ｃａｔ，猫", []) == "ｃａｔ，猫"
    assert normalize.normalized("ｃａｔ，猫", ["nfkc"]) == "cat,猫"
    with pytest.raises(UsageError, match=r"unknown normalizer 'nfcd'; did you mean nfkc"):
        normalize.normalized("猫", ["nfcd"])

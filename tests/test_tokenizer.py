"""Token ids compared with the reference; threads, forks and unusual input."""

import multiprocessing
import os
import pickle
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import GOLDEN

from cn_clip.errors import UsageError
from cn_clip.tokenizer import Tokenizer, TruncationWarning, default_tokenizer


@pytest.fixture
def tokenizer():
    return Tokenizer()


@pytest.mark.filterwarnings("ignore::cn_clip.tokenizer.TruncationWarning")
def test_ids_equal_the_reference_on_all_golden_strings(tokenizer, golden_strings):
    expected = np.load(GOLDEN / "tokens.npz")["ids"]
    np.testing.assert_array_equal(tokenizer(golden_strings), expected)


def test_curly_quotes_become_straight_ones_for_every_caller(tokenizer):
    assert tokenizer.tokenize("“你好”") == ['"', "你", "好", '"']
    assert tokenizer.encode("“你好”") == tokenizer.encode('"你好"')


def test_private_use_characters_are_unknown_not_dropped(tokenizer):
    assert tokenizer.tokenize("a \ue123 b") == ["a", "[UNK]", "b"]


def test_a_word_of_more_than_200_characters_is_one_unknown(tokenizer):
    assert tokenizer.tokenize("a" * 201) == ["[UNK]"]
    assert "[UNK]" not in tokenizer.tokenize("a" * 200)


def test_every_ideograph_block_is_split_into_single_characters(tokenizer):
    # The last one is one of the 256 characters that BertNormalizer misses.
    for character in "㐀一豈𠀀𪜀𫝀𫠠":
        assert len(tokenizer.tokenize(f"a{character}b")) == 3, character


def test_control_characters_vanish_and_new_punctuation_splits(tokenizer):
    for code in range(0x3000):
        character = chr(code)
        pieces = tokenizer.tokenize(f"a{character}b")
        category = unicodedata.category(character)
        if category in ("Cc", "Cf") and character not in "\t\n\r":
            assert pieces == tokenizer.tokenize("ab"), hex(code)
        elif category.startswith(("P", "Z")):
            assert (pieces[0], pieces[-1]) == ("a", "b"), hex(code)


def test_lone_surrogates_are_unknown(tokenizer):
    assert tokenizer.tokenize("a \ud800 b") == ["a", "[UNK]", "b"]


def test_an_empty_text_is_two_special_tokens(tokenizer):
    assert tokenizer.encode(["", " \t"]) == [[101, 102], [101, 102]]


def test_truncation_warns_once_and_counts_all(tokenizer):
    long = "中" * 60
    with pytest.warns(TruncationWarning, match="2 text"):
        ids = tokenizer([long, "短", long])
    assert ids.shape == (3, 52)
    assert ids[0, 0] == 101 and ids[0, -1] == 102
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer([long])
    assert tokenizer.truncated == 3


def test_exactly_the_context_length_is_not_truncated(tokenizer):
    assert len(tokenizer.encode("中" * 50)[0]) == 52
    assert tokenizer.truncated == 0


def test_a_short_context_keeps_both_ends(tokenizer):
    with pytest.warns(TruncationWarning):
        assert tokenizer.encode("中文字", context_length=3) == [[101, 704, 102]]
    with pytest.raises(UsageError, match="no room"):
        tokenizer.encode("中", context_length=1)


@pytest.mark.parametrize("texts", [[1], ["好", None], [b"bytes"]])
def test_an_input_that_is_not_a_string_is_named(tokenizer, texts):
    with pytest.raises(UsageError, match=r"text \d is .*expected a string"):
        tokenizer(texts)


def test_100_000_texts_at_once(tokenizer):
    ids = tokenizer([f"第{i}张照片" for i in range(100_000)])
    assert ids.shape == (100_000, 52)
    assert (ids[:, 0] == 101).all() and ((ids == 102).sum(1) == 1).all()


def test_pickled_copies_give_the_same_ids(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode("皮卡丘") == tokenizer.encode("皮卡丘")


def test_threads_share_one_tokenizer(tokenizer):
    texts = [f"第{i}只猫，{'长' * (i % 70)}" for i in range(400)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = Tokenizer()
        expected = alone.encode(texts)
        with ThreadPoolExecutor(8) as pool:
            rows = [row for part in pool.map(tokenizer.encode, texts) for row in part]
    assert rows == expected
    assert tokenizer.truncated == alone.truncated > 100


def _ids_of(text):
    return default_tokenizer().encode([text] * 8)[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12: fork with threads alive
def test_a_forked_worker_tokenizes(capfd):
    expected = _ids_of("皮卡丘")  # the parent's thread pool is running now
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_ids_of, ["皮卡丘"] * 4) == [expected] * 4
    assert "TOKENIZERS_PARALLELISM" not in capfd.readouterr().err


def test_a_file_that_is_not_a_vocabulary_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("猫\n狗\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"\[PAD\]"):
        Tokenizer(tmp_path / "vocab.txt")

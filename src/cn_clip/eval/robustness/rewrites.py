"""Rewrites of a query, in other words or another script: pure functions of a text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from cn_clip.normalize import opencc_converter, simplified
from cn_clip.tokenizer import CONTEXT_LENGTH, default_tokenizer
from cn_clip.translation import N_

# Describes no image; each character is one token.
_FILLER = (
    "这张照片是前些日子随手拍下来的当时没有多想后来整理相册时又翻到了它觉得还不错就一直留着没有删"
)
_TO_HALF_WIDTH = str.maketrans({chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)})
_TO_FULL_WIDTH = str.maketrans({chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)})
# Chinese punctuation to that of an English keyboard.
_TO_ASCII_PUNCTUATION = str.maketrans("\u3000。、“”‘’《》【】", " .,\"\"''<>[]")
_IDEOGRAPH = r"[\u3400-\u4dbf\u4e00-\u9fff]"
# Characters before and after a one-character word that rule out a longer word.
_BEFORE = "的和与及或是有在一两三四五六七八九十只个头匹条把张辆朵棵块颗片座本件双对群枚面支艘架"
_AFTER = "的和与及或是在"
_NUMBER_WITH_MEASURE = re.compile(
    r"([一两二三四五六七八九十])(?:[只个头匹条把张辆朵棵块颗片座本件双对群枚面支艘架])"
)
_NUMBERS = dict(
    zip(
        "两二三四五六七八九十",
        ["two", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        strict=True,
    )
)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A rewrite: ``apply`` returns the rewritten text, or the text itself if it does not apply."""

    name: str
    description: str
    apply: Callable[[str], str]


def all_rewrites(*, context_length: int = CONTEXT_LENGTH) -> tuple[Rewrite, ...]:
    """Return all rewrites.

    Args:
        context_length: of the model in tokens, with [CLS] and [SEP].
    """

    def with_suffix(text: str) -> str:
        return padded_after(text, context_length=context_length)

    def with_prefix(text: str) -> str:
        return padded_before(text, context_length=context_length)

    def truncated(text: str) -> str:
        return padded_before(text, context_length=context_length, cut=True)

    return (
        Rewrite(N_("simplified"), N_("in simplified characters"), simplified),
        Rewrite(N_("traditional"), N_("in traditional characters"), traditional),
        Rewrite(N_("taiwan"), N_("in traditional characters, with Taiwan's words"), taiwan),
        Rewrite(
            N_("half-width"),
            N_("with half-width ASCII punctuation, letters and digits"),
            half_width,
        ),
        Rewrite(N_("full-width"), N_("with full-width letters, digits and signs"), full_width),
        Rewrite(N_("no punctuation"), N_("without punctuation"), without_punctuation),
        Rewrite(N_("full stop"), N_("with 。 at the end"), with_full_stop),
        Rewrite(N_("synonyms"), N_("with synonyms of the words in the table"), with_synonyms),
        Rewrite(N_("mixed"), N_("with English for the words in the table"), mixed),
        Rewrite(N_("english"), N_("in English, if the table has every word"), english),
        Rewrite(N_("text behind"), N_("with filler text after it, cut at the limit"), with_suffix),
        Rewrite(
            N_("text in front"), N_("with filler text before it, up to the limit"), with_prefix
        ),
        Rewrite(
            N_("cut"), N_("with so much text before it that its second half is cut"), truncated
        ),
    )


def traditional(text: str) -> str:
    """Return the text in traditional characters, by OpenCC.

    Raises:
        UsageError: OpenCC is not installed; also from ``taiwan``.
    """
    return opencc_converter("s2t")(text)


def taiwan(text: str) -> str:
    """Return the text in characters and words of Taiwan, such as 腳踏車 for 自行车, by OpenCC."""
    return opencc_converter("s2twp")(text)


def half_width(text: str) -> str:
    """Return the text with half-width ASCII characters: ，becomes , and 。becomes a full stop."""
    return text.translate(_TO_HALF_WIDTH).translate(_TO_ASCII_PUNCTUATION)


def full_width(text: str) -> str:
    """Return the text with ASCII letters, digits and signs in full width; spaces are kept."""
    return text.translate(_TO_FULL_WIDTH)


def without_punctuation(text: str) -> str:
    """Return the text without punctuation; a space replaces it between Latin letters or digits."""
    spaced = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in text)
    return re.sub(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])", "", spaced) or text


def with_full_stop(text: str) -> str:
    """Return the text with 。 at the end, unless it ends in punctuation."""
    text = text.rstrip()
    return text if text and unicodedata.category(text[-1])[0] == "P" else f"{text}。"


def with_synonyms(text: str) -> str:
    """Return the text with words of the table replaced by their synonyms."""
    return _words().sub(lambda match: _table()[match[0]][0] or match[0], text)


def mixed(text: str) -> str:
    """Return the text with words of the table in English: 一只cat。"""

    def to_english(match: re.Match[str]) -> str:
        name = _table()[match[0]][1]
        return f"\0{name}\0" if name else match[0]

    separated = re.sub(r"\0+", "\0", _words().sub(to_english, text))
    return re.sub(r"(?<=[0-9A-Za-z])\0(?=[0-9A-Za-z])", " ", separated).replace("\0", "")


def english(text: str) -> str:
    """Return the text in English, word by word, if all its words are in the table.

    Measure words and the number one are dropped: 两只红苹果 becomes two red apple.
    """
    rest, words = without_punctuation(text), []
    while rest:
        number = _NUMBER_WITH_MEASURE.match(rest)
        if number:
            words.append(_NUMBERS.get(number[1], ""))
            rest = rest[number.end() :]
            continue
        word = next((word for word in _longest_first() if rest.startswith(word)), "")
        name = _table()[word][1] if word else ""
        if not name and rest[0] not in "的和":
            return text
        words.append(name or {"的": "", "和": "and"}[rest[0]])
        rest = rest[len(word or rest[0]) :]
    return " ".join(filter(None, words)) or text


def padded_after(text: str, *, context_length: int = CONTEXT_LENGTH) -> str:
    """Return the text followed by filler text, one token more than fits; the text is not cut."""
    missing = context_length - 1 - _length(text)  # one more than fits
    return text + _filler(missing) if missing > 0 else text


def padded_before(text: str, *, context_length: int = CONTEXT_LENGTH, cut: bool = False) -> str:
    """Return the text after filler text, so that it ends at the context limit or, with ``cut``, so
    that its second half is beyond the limit."""
    length = _length(text)
    kept = length // 2 if cut else length
    if length < 2:  # nothing of it would be left
        return text
    return _filler(max(0, context_length - 2 - kept)) + text


@cache
def _table() -> dict[str, tuple[str, str]]:
    """Return word -> (synonym, English name); either may be empty."""
    raw = files("cn_clip").joinpath("eval/robustness/words.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in raw.splitlines() if line and not line.startswith("#"))
    return {word: (synonym, name) for word, synonym, name in rows}


@cache
def _longest_first() -> tuple[str, ...]:
    return tuple(sorted(_table(), key=len, reverse=True))


@cache
def _words() -> re.Pattern[str]:
    """Return a pattern of the table's words, longest first; one-character words match only if the
    characters around them rule out a longer word."""
    single = "".join(word for word in _table() if len(word) == 1)
    isolated = (
        rf"(?:(?<!{_IDEOGRAPH})|(?<=[{_BEFORE}]))[{single}](?:(?!{_IDEOGRAPH})|(?=[{_AFTER}]))"
    )
    return re.compile("|".join([*(word for word in _longest_first() if len(word) > 1), isolated]))


def _length(text: str) -> int:
    return len(default_tokenizer().tokenize(text))


def _filler(length: int) -> str:
    return (_FILLER * (length // len(_FILLER) + 1))[:length]

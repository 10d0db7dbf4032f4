"""One query in other words or other writing: pure functions from a text to a text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files

from cn_clip.errors import UnknownNameError, UsageError
from cn_clip.tokenizer import CONTEXT_LENGTH, default_tokenizer

# Says nothing of what an image shows. A token each character.
_NEUTRAL = (
    "这张照片是前些日子随手拍下来的当时没有多想后来整理相册时又翻到了它觉得还不错就一直留着没有删"
)
_HALF = str.maketrans({chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)})
_FULL = str.maketrans({chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)})
# What an English keyboard has instead.
_KEYBOARD = str.maketrans("\u3000。、“”‘’《》【】", " .,\"\"''<>[]")
_IDEOGRAPH = r"[\u3400-\u4dbf\u4e00-\u9fff]"
# Before and after a word of one character there is no word that it could be a part of.
_BEFORE = "的和与及或是有在一两三四五六七八九十只个头匹条把张辆朵棵块颗片座本件双对群枚面支艘架"
_AFTER = "的和与及或是在"
_COUNTED = re.compile(
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
class Variant:
    """A way to ask: ``ask`` returns the text so asked, or the text itself if it cannot be."""

    name: str
    meaning: str
    ask: Callable[[str], str]


def variants(*, context_length: int = CONTEXT_LENGTH) -> tuple[Variant, ...]:
    """Return every way to ask that is known.

    Args:
        context_length: tokens that the model reads, with [CLS] and [SEP].
    """

    def padded(text: str) -> str:
        return padded_behind(text, context_length=context_length)

    def last(text: str) -> str:
        return padded_in_front(text, context_length=context_length)

    def cut(text: str) -> str:
        return padded_in_front(text, context_length=context_length, cut=True)

    return (
        Variant("simplified", "in simplified characters", simplified),
        Variant("traditional", "in traditional characters", traditional),
        Variant("taiwan", "in traditional characters, with Taiwan's words", taiwan),
        Variant("half-width", "with the punctuation and width of an English keyboard", half_width),
        Variant("full-width", "with letters and digits in full width", full_width),
        Variant("no punctuation", "without punctuation", without_punctuation),
        Variant("full stop", "with 。 at the end", with_full_stop),
        Variant("synonyms", "with synonyms for the words of our table", with_synonyms),
        Variant("mixed", "with English for the words of our table", mixed),
        Variant("english", "wholly in English, where our table has every word", english),
        Variant("text behind", "with neutral text behind, cut at the limit", padded),
        Variant("text in front", "with neutral text in front, up to the limit", last),
        Variant("cut", "with so much text in front that its second half is cut", cut),
    )


def simplified(text: str) -> str:
    """Return the text in simplified characters, by OpenCC.

    Raises:
        UsageError: OpenCC is not installed; so do ``traditional`` and ``taiwan``.
    """
    return _opencc("t2s")(text)


def traditional(text: str) -> str:
    """Return the text in traditional characters, by OpenCC."""
    return _opencc("s2t")(text)


def taiwan(text: str) -> str:
    """Return the text in Taiwan's characters and words, 腳踏車 for 自行车, by OpenCC."""
    return _opencc("s2twp")(text)


def nfkc(text: str) -> str:
    """Return the text in Unicode's form NFKC: ｃａｆé，１ is café,1."""
    return unicodedata.normalize("NFKC", text)


def half_width(text: str) -> str:
    """Return the text as an English keyboard would have it: ，is , and 。is a full stop."""
    return text.translate(_HALF).translate(_KEYBOARD)


def full_width(text: str) -> str:
    """Return the text with every letter, digit and sign of ASCII in full width; spaces stay."""
    return text.translate(_FULL)


def without_punctuation(text: str) -> str:
    """Return the text without punctuation; what it parted is parted by a space where both sides
    are Latin letters or digits."""
    bare = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in text)
    return re.sub(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])", "", bare) or text


def with_full_stop(text: str) -> str:
    """Return the text with 。 at its end, unless it ends in punctuation."""
    text = text.rstrip()
    return text if text and unicodedata.category(text[-1])[0] == "P" else f"{text}。"


def with_synonyms(text: str) -> str:
    """Return the text with every word of our table that has a synonym replaced by it."""
    return _words().sub(lambda found: _table()[found[0]][0] or found[0], text)


def mixed(text: str) -> str:
    """Return the text with every word of our table in English: 一只cat。"""

    def put(found: re.Match[str]) -> str:
        name = _table()[found[0]][1]
        return f"\0{name}\0" if name else found[0]

    parted = re.sub(r"\0+", "\0", _words().sub(put, text))
    return re.sub(r"(?<=[0-9A-Za-z])\0(?=[0-9A-Za-z])", " ", parted).replace("\0", "")


def english(text: str) -> str:
    """Return the text in English, word by word, if all its words are in our table.

    One of a thing loses its number, and every number its measure word: 两只红苹果 is two red apple.
    """
    rest, said = without_punctuation(text), []
    while rest:
        counted = _COUNTED.match(rest)
        if counted:
            said.append(_NUMBERS.get(counted[1], ""))
            rest = rest[counted.end() :]
            continue
        word = next((word for word in _longest_first() if rest.startswith(word)), "")
        name = _table()[word][1] if word else ""
        if not name and rest[0] not in "的和":
            return text
        said.append(name or {"的": "", "和": "and"}[rest[0]])
        rest = rest[len(word or rest[0]) :]
    return " ".join(filter(None, said)) or text


def padded_behind(text: str, *, context_length: int = CONTEXT_LENGTH) -> str:
    """Return the text with neutral text behind it, more than fits; the text itself is not cut."""
    more = context_length - 1 - _length(text)  # one more than there is room for
    return text + _neutral(more) if more > 0 else text


def padded_in_front(text: str, *, context_length: int = CONTEXT_LENGTH, cut: bool = False) -> str:
    """Return the text with neutral text in front, so that it ends where the model stops reading,
    or, with ``cut``, so that its second half lies beyond."""
    length = _length(text)
    kept = length // 2 if cut else length
    if length < 2:  # no half of it would be left
        return text
    return _neutral(max(0, context_length - 2 - kept)) + text


# Name -> what it does to a query. None of them is ever on by itself: official figures are without.
NORMALIZERS: dict[str, Callable[[str], str]] = {"nfkc": nfkc, "simplified": simplified}


def normalized(text: str, names: Sequence[str]) -> str:
    """Return a query after the normalisers of these names, one after another.

    Raises:
        UsageError: a name is not known, or OpenCC is needed and not installed.
    """
    for name in names:
        if name not in NORMALIZERS:
            raise UnknownNameError("normaliser", name, NORMALIZERS)
        text = NORMALIZERS[name](text)
    return text


def have_opencc() -> bool:
    """Tell whether OpenCC is installed."""
    try:
        import_module("opencc")
    except ImportError:
        return False
    return True


@cache
def _opencc(config: str) -> Callable[[str], str]:
    try:
        opencc = import_module("opencc")
    except ImportError:
        raise UsageError(
            "simplified and traditional characters need OpenCC: pip install 'cn-clip[eval]'"
        ) from None
    convert: Callable[[str], str] = opencc.OpenCC(config).convert
    return convert


@cache
def _table() -> dict[str, tuple[str, str]]:
    """Return word -> its synonym and its English name, either of which may be empty."""
    raw = files("cn_clip").joinpath("eval/robustness/words.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in raw.splitlines() if line and not line.startswith("#"))
    return {word: (synonym, name) for word, synonym, name in rows}


@cache
def _longest_first() -> tuple[str, ...]:
    return tuple(sorted(_table(), key=len, reverse=True))


@cache
def _words() -> re.Pattern[str]:
    """Match the words of the table, the longest first; one of one character only between what
    cannot be a part of its word."""
    one = "".join(word for word in _table() if len(word) == 1)
    alone = rf"(?:(?<!{_IDEOGRAPH})|(?<=[{_BEFORE}]))[{one}](?:(?!{_IDEOGRAPH})|(?=[{_AFTER}]))"
    return re.compile("|".join([*(word for word in _longest_first() if len(word) > 1), alone]))


def _length(text: str) -> int:
    return len(default_tokenizer().tokenize(text))


def _neutral(length: int) -> str:
    return (_NEUTRAL * (length // len(_NEUTRAL) + 1))[:length]

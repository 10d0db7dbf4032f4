"""Chinese, English and mixed text in SQLite FTS5: what is inserted, and what is matched.

No tokenizer of FTS5 fits Chinese: ``unicode61`` takes a whole sentence for a word, ``trigram``
finds nothing for queries below three characters, which are most words. Here a text becomes a
sequence of units, a Chinese character, a Latin word or a number, and each character is stored as a
*bigram* with the character after it: 海边日落 as ``海边 边日 日落 落``. A query becomes a phrase of
such tokens: 日落 is ``"日落"``, 边日落 is ``"边日 日落"``, one character the prefix ``"海"*``.
So every substring of Chinese characters is found, and nothing else is; Latin words and numbers are
found whole, or by the start of a word of at least three letters.

Compared with single characters, jieba's words and trigrams in docs/adr/0014-bigrams-in-fts5.md, by
``benchmarks/fulltext.py``.

Before, texts and queries are folded: full width to half width, capitals to small letters, accents
dropped, and traditional characters to simplified ones if OpenCC is installed. Folding changes no
character because of its neighbours, so a substring stays one. Spaces and punctuation of a *text*
are ignored between Chinese characters: signs space out or break their words, and captions and what
is recognised in images differ in punctuation.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from cn_clip.normalize import have_opencc, opencc_converter
from cn_clip.text import valid_text

# ``tokenize`` of the FTS5 table: every non-ASCII character is part of a token, whichever version of
# Unicode SQLite knows. What is inserted is split at spaces already.
TOKENIZER = "ascii"

MAX_QUERY = 200  # units of a query; what follows is ignored

# Written without spaces between words: Chinese, Japanese, Korean, Thai, Lao, Khmer, Burmese.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff"
    "\u3105-\u318f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00016fe0-\U00018dff\U0001b000-\U0001b2ff\U00020000-\U0003ffff"
)
# Pictures: arrows to dingbats, and emoji. Skin tones (1f3fb to 1f3ff) are ignored.
_PICTURES = "\u2190-\u2bff\U0001f000-\U0001f3fa\U0001f400-\U0001faff"
_CHARACTER = re.compile(rf"[{_UNSPACED}{_PICTURES}]")
# A character, a number, or a word of letters that are neither.
_UNIT = re.compile(rf"[{_UNSPACED}{_PICTURES}]|\d+|[^\W\d_{_UNSPACED}{_PICTURES}]+")
_ACCENTS = re.compile("[\u0300-\u036f]")
_MIN_PREFIX = 3  # letters of a word whose start is enough
_IDEOGRAPHS = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x32000))


def fold_version() -> str:
    """Return the version of folding and tokens, for the stamp of an index.

    It differs with and without OpenCC; an index with another one is to be built again.
    """
    return "1+opencc" if have_opencc() else "1"


def fold(text: str) -> str:
    """Return a text folded: width, case, accents, and script if OpenCC is installed.

    ``Ｃａｆé 貓`` becomes ``cafe 猫``. ``fold(a + b)`` is ``fold(a) + fold(b)``, unless ``b``
    begins with a combining character.
    """
    text = unicodedata.normalize("NFKC", valid_text(text)).casefold()
    text = _ACCENTS.sub("", unicodedata.normalize("NFKD", text))
    text = unicodedata.normalize("NFKC", text)
    return text.translate(_to_simplified()) if have_opencc() else text


def units(text: str) -> list[str]:
    """Return the units of a text, folded: Chinese characters, words, numbers, emoji.

    ``iPhone15手机`` becomes ``iphone``, ``15``, ``手``, ``机``. Everything else is dropped.
    """
    return units_of_folded(fold(text))


def units_of_folded(text: str) -> list[str]:
    """Return the units of a text that is folded already."""
    return _UNIT.findall(text)


def tokens(text: str) -> str:
    """Return the tokens of a text, separated by spaces, for insertion into an FTS5 table.

    The table is created with ``tokenize = 'ascii'`` (``TOKENIZER``). All strings are valid; a text
    without letters gives an empty string.
    """
    return " ".join(_tokens(units(text)))


def match_expression(query: str, *, partial: bool = False) -> str:
    """Return the expression for ``MATCH`` that finds the texts with all parts of a query.

    Parts are separated by spaces; a part is found as it stands, whatever is between Chinese
    characters in the text. Nothing in the query is FTS5 syntax: ``AND``, ``"`` and ``*`` are a word
    and punctuation. A query without letters, digits and emoji gives an empty string, which
    ``MATCH`` refuses: there is nothing to search for.

    Args:
        query: any string; its first 200 units are used.
        partial: find texts with any two neighbouring characters, or any word or number of at least
            two letters or digits, of the query instead; to be ranked by
            ``cn_clip.search.fusion.match_text``. A query without these is found as a whole.
    """
    parts, rest = [], MAX_QUERY
    for part in fold(query).split():
        found = _UNIT.findall(part)[:rest]
        rest -= len(found)
        if found:
            parts.append(found)
    if partial and sum(map(len, parts)) > 1:
        terms = [_phrase([token], word) for found in parts for token, word in _alone(found)]
        if terms:
            return " OR ".join(dict.fromkeys(terms))
    phrases = []
    for found in parts:
        last, phrase = found[-1], _tokens(found)
        if len(found) > 1 and is_character(last) and is_character(found[-2]):
            phrase.pop()  # the bigram before has it, and the text may go on
        phrases.append(_phrase(phrase, last))
    return " AND ".join(dict.fromkeys(phrases))


def _tokens(found: list[str]) -> list[str]:
    """Return each unit as its token: a character together with the one that follows it."""
    following = [*found[1:], ""]  # one more, if there are none
    return [
        unit + after if is_character(unit) and is_character(after) else unit
        for unit, after in zip(found, following, strict=False)
    ]


def _alone(found: list[str]) -> list[tuple[str, str]]:
    """Return the tokens that mean something alone, bigrams and words, with the units they start."""
    pairs = zip(_tokens(found), found, strict=True)
    return [(token, unit) for token, unit in pairs if len(token) > 1]


def _phrase(phrase: list[str], last: str) -> str:
    """Return tokens as a phrase; its end is a prefix if the last unit may be longer in a text."""
    single = is_character(last) and phrase[-1] == last
    word = phrase[-1] == last and last.isalpha() and len(last) >= _MIN_PREFIX
    return f'"{" ".join(phrase)}"' + ("*" if single or word else "")


def is_character(unit: str) -> bool:
    """Return whether a unit is one character of a script without spaces, or an emoji."""
    return len(unit) == 1 and _CHARACTER.match(unit) is not None


@cache
def _to_simplified() -> dict[int, str]:
    """Return traditional character -> simplified character, by OpenCC, for ``str.translate``.

    Character by character: OpenCC converts some by their neighbours (乾 in 乾隆 and 乾杯), and a
    query would no longer be a substring of the text it was taken from.
    """
    every = [chr(code) for start, stop in _IDEOGRAPHS for code in range(start, stop)]
    simple = opencc_converter("t2s")("\n".join(every)).split("\n")
    return {
        ord(old): new
        for old, new in zip(every, simple, strict=True)
        if old != new and len(new) == 1
    }

"""The language of queries, and the embedding of a query.

A query is one phrase, unless it has signs or weights:

====================  ==========================================================================
``海边的日落``          one phrase; its words are never taken apart
``猫 -室内``            a minus sign before a word or a "quoted phrase": less of it
``猫 +雪地``            a plus sign begins another phrase: both
``2:猫 1.5:雪地``       a weight begins a phrase that counts more, or less
``-2:室内``             much less of it
``-"living room"``      quotes keep words together after a minus sign
``"-5度"``              quotes around a phrase: signs in it are text
====================  ==========================================================================

Signs and weights count only at the start of a word and directly before a word or quote, and a minus
sign takes one word. So these are text: ``T-恤``, ``red-haired``, ``-5度``, ``12:30``, ``16:9``,
``猫 - 狗``, ``C++``. Full-width ``＋－：“”`` count like ``+-:""``. A weight may be inside the
quotes: ``"2:猫"`` is ``2:"猫"``; ``1:"2:猫"`` is the text itself.

The embedding of a query is the weighted sum of the unit embeddings of its terms, normalised; terms
are phrases, images, and stored embeddings. Because all ranking is by dot product, an image's score
is the weighted sum of its cosines to the terms, up to one factor.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.backends.pipeline import iter_images
from cn_clip.embedder import Embedder
from cn_clip.errors import UsageError
from cn_clip.image.decode import ImageInput
from cn_clip.normalize import have_opencc, nfkc, normalized
from cn_clip.text import valid_text
from cn_clip.translation import _

MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0

_SIGNS = "-+＋－\N{MINUS SIGN}"  # the hyphen first: not a range
_QUOTES = '"＂“”'
_MINUS = "-－\N{MINUS SIGN}"
_WORD = re.compile(r"\S+")
_QUOTED = re.compile(rf"[{_QUOTES}]([^{_QUOTES}]*)[{_QUOTES}](?!\S)")
_SIGN = re.compile(rf"[{_SIGNS}]")
# Also what was meant as a number but is none, such as 1,5 and 1.2.3.
_WEIGHT = re.compile(r"([\d.,．]*\d[\d.,．]*(?:[eE][+-]?\d+)?|(?i:nan|inf|infinity))[:：]")
_CANCELLED = 1e-4  # length of a sum of unit vectors, relative to its weights, that is rounding


@dataclass(frozen=True, slots=True)
class Term:
    """A phrase and its weight, which is negative for a phrase to avoid."""

    text: str
    weight: float = 1.0

    def __str__(self) -> str:
        # The text 2:猫 in quotes would have the weight 2, unless it has one already.
        bare = abs(self.weight) == 1 and not _WEIGHT.match(self.text)
        weight = "" if bare else f"{abs(self.weight):g}:"
        return f'{"-" if self.weight < 0 else "+"}{weight}"{self.text}"'


@dataclass(frozen=True, slots=True)
class Query:
    """What to search for: phrases, images and ids of stored images, each with a weight.

    At least one weight is positive. ``str`` shows how a query was understood.
    """

    terms: tuple[Term, ...] = ()
    images: tuple[tuple[ImageInput, float], ...] = ()
    like: tuple[tuple[int, float], ...] = ()

    @property
    def is_phrase(self) -> bool:
        """Whether the query is one phrase and nothing else."""
        return len(self.terms) == 1 and not self.images and not self.like

    def __str__(self) -> str:
        if self.is_phrase:
            return self.terms[0].text
        return " ".join(str(term) for term in self.terms).removeprefix("+")


def parse_query(
    text: str | Sequence[str] = "",
    *,
    images: ImageInput | Iterable[ImageInput] = (),
    like: Iterable[int | str] = (),
) -> Query:
    """Parse a query in the language of this module.

    Args:
        text: the query; or the arguments of a command line, which are joined by spaces. Of several
            arguments, one that begins with a minus sign and has no other sign or weight is one
            phrase: the shell has removed its quotes.
        images: one or several, to search with. A path may have a sign and a weight:
            ``-2:photo.jpg``; write ``./2:photo.jpg`` for a file of such a name.
        like: ids of images of the library, each with a sign and a weight likewise: ``0.5:17``.

    Raises:
        UsageError: the query is empty or has only negative terms; a weight is not a number between
            ``MIN_WEIGHT`` and ``MAX_WEIGHT``; a quote after a sign or weight is not closed; an id
            is not a positive integer.
    """
    pieces = [text] if isinstance(text, str) else list(text)
    terms: list[Term] = []
    joined = ""
    for piece in map(valid_text, pieces):
        negative = _negative_argument(piece) if len(pieces) > 1 else None
        if negative is None:
            joined = f"{joined} {piece}"
            continue
        terms += _terms(joined)
        terms.append(negative)
        joined = ""
    terms += _terms(joined)
    query = Query(
        tuple(terms),
        tuple(map(_weighted_image, iter_images(images)[0])),
        tuple(map(_weighted_id, like)),
    )
    weights = _weights(query)
    if not weights:
        raise UsageError(_("the query is empty; give a text such as 海边的日落, or an image"))
    if max(weights) < 0:
        raise UsageError(
            _(
                "the query {query!r} says only what to avoid; add what to look for, as in 海边 "
                '-人, or search for the text itself in quotes: "-人"',
                query=joined.strip() or str(query),
            )
        )
    return query


def default_normalizers() -> tuple[str, ...]:
    """Return the names of the normalizers that queries pass by default.

    ``simplified`` is among them if OpenCC is installed. Measured by ``benchmarks/queries.py``.
    """
    return ("nfkc", "simplified") if have_opencc() else ("nfkc",)


def embed_query(
    embedder: Embedder,
    query: Query,
    *,
    vector_of: Callable[[int], npt.NDArray[Any]] | None = None,
    normalizers: Sequence[str] | None = None,
) -> npt.NDArray[np.float32]:
    """Return the embedding of a query: a unit vector, float32 (D,).

    Args:
        embedder: the model that embedded the library.
        query: from ``parse_query``.
        vector_of: returns the stored embedding (D,) of an id in ``query.like``.
        normalizers: names from ``cn_clip.normalize.NORMALIZERS``, applied to each phrase in this
            order; by default ``default_normalizers``.

    Raises:
        UsageError: the terms cancel each other, or ``query.like`` has an id without an embedding.
        ImageError: an image is unreadable.
    """
    names = default_normalizers() if normalizers is None else normalizers
    embeddings = [np.empty((0, embedder.dim), np.float32)]
    if query.terms:
        embeddings.append(
            embedder.embed_texts([normalized(term.text, names) for term in query.terms])
        )
    if query.images:
        embeddings.append(embedder.embed_images([image for image, _weight in query.images]))
    for number, _weight in query.like:
        vector = None if vector_of is None else np.asarray(vector_of(number), np.float32)
        if vector is None or not vector.any():
            raise UsageError(
                _("image {number} has no embedding; give the id of a search result", number=number)
            )
        embeddings.append(vector[None])
    weights = np.array(_weights(query), np.float64)
    total = weights @ np.concatenate(embeddings).astype(np.float64)  # (D,)
    length = float(np.linalg.norm(total))
    if not length > _CANCELLED * np.abs(weights).sum():
        raise UsageError(
            _(
                "the terms of the query {query!r} cancel each other; remove one, or change a "
                "weight as in 2:猫",
                query=str(query),
            )
        )
    return (total / length).astype(np.float32)


def _weights(query: Query) -> list[float]:
    """Return the weights in the order of ``embed_query``: phrases, images, ids."""
    return [
        *(term.weight for term in query.terms),
        *(weight for _image, weight in query.images),
        *(weight for _id, weight in query.like),
    ]


@dataclass(frozen=True, slots=True)
class _Marked:
    """A term with a sign or weight: its text is ``text[begin:end]``, and what follows starts at
    ``resume``. The text of an ``open`` one goes on to the next sign or weight."""

    weight: float
    begin: int
    end: int
    resume: int
    open: bool = False


def _terms(text: str) -> list[Term]:
    """Return the phrases of a text with their weights, in order."""
    terms: list[Term] = []
    phrase, weight, position = 0, 1.0, 0  # the phrase since the last term
    while word := _WORD.search(text, position):
        start, position = word.span()
        marked = _marked(text, word)
        if marked is None:  # signs in quotes are text
            quoted = _QUOTED.match(text, start)
            position = quoted.end() if quoted else position
            continue
        terms += _phrases(text[phrase:start], weight)
        if marked.open:
            phrase, weight = marked.begin, marked.weight
        else:
            terms.append(_term(text[marked.begin : marked.end], marked.weight))
            phrase, weight, position = marked.resume, 1.0, marked.resume
    return terms + _phrases(text[phrase:], weight)


def _phrases(text: str, weight: float) -> list[Term]:
    """Return the terms of a text without signs and weights: one phrase, or several in quotes."""
    text = text.strip()
    if not text:
        return []
    quoted, position = [], 0
    while position < len(text) and (match := _QUOTED.match(text, position)):
        quoted.append(_term(match[1], weight))
        following = _WORD.search(text, match.end())
        position = following.start() if following else len(text)
    return quoted if position == len(text) else [Term(text, weight)]


def _term(text: str, weight: float) -> Term:
    if not text.strip():
        raise UsageError(_("a quoted phrase of the query is empty; remove it"))
    return Term(text.strip(), weight)


def _marked(text: str, word: re.Match[str]) -> _Marked | None:
    """Return the term with a sign or weight at the start of a word; None if the word is text."""
    start, end = word.span()
    sign = _SIGN.match(text, start)
    factor = -1.0 if sign and sign[0] in _MINUS else 1.0
    number = _WEIGHT.match(text, sign.end() if sign else start)
    mark = number or sign
    if mark and _begins_term(text, mark.end()):
        begin = mark.end()
        factor *= _weight(number[1], text[start:]) if number else 1.0
    elif text[start] in _QUOTES:  # a weight inside the quotes
        begin = start
    else:
        return None
    if text[begin] not in _QUOTES:
        return _Marked(factor, begin, end, end, open=factor > 0)
    quoted = _QUOTED.match(text, begin)
    inside = None if number else _WEIGHT.match(text, begin + 1)
    if quoted and inside and inside.end() < quoted.end(1) and _begins_term(text, inside.end()):
        factor *= _weight(inside[1], quoted[0])
        return _Marked(factor, inside.end(), quoted.end(1), quoted.end())
    if begin == start:
        return None
    if quoted is None:
        raise UsageError(
            _("the quote in {text!r} is not closed; add a quote at its end", text=text[start:])
        )
    return _Marked(factor, quoted.start(1), quoted.end(1), quoted.end())


def _begins_term(text: str, position: int) -> bool:
    """Return whether a word or quote is at a position: a letter, an emoji or an opening bracket,
    but no digit, as in -5 and 12:30, and no sign, as in -- and +/-."""
    if position >= len(text):
        return False
    category = unicodedata.category(text[position])
    return text[position] in _QUOTES or category[0] in "LM" or category in ("So", "Ps")


def _weight(number: str, text: str) -> float:
    """Return the weight of a term.

    Raises:
        UsageError: it is not a number in the range.
    """
    try:
        weight = float(nfkc(number))
    except ValueError:
        weight = math.nan
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:  # also NaN
        raise UsageError(
            _(
                "the weight {number} in {text!r} is not a number from {low:g} to {high:g}; for the "
                'text itself put 1: and quotes around it: 1:"{number}:…"',
                number=number,
                text=text,
                low=MIN_WEIGHT,
                high=MAX_WEIGHT,
            )
        )
    return weight


def _negative_argument(argument: str) -> Term | None:
    """Return an argument as one negative phrase, if it is a minus sign and several plain words."""
    text = argument.strip()
    words = list(_WORD.finditer(text))
    if len(words) < 2 or any(quote in text for quote in _QUOTES):
        return None
    first, *others = (_marked(text, word) for word in words)
    if first is None or first.open or any(others):
        return None
    return Term(text[first.begin :], first.weight)


def _weighted_image(image: ImageInput) -> tuple[ImageInput, float]:
    if not isinstance(image, str):
        return image, 1.0
    path, weight = _weighted(image)
    return path, weight


def _weighted_id(reference: int | str) -> tuple[int, float]:
    text, weight = _weighted(str(reference))
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            _("{reference!r} is no id of an image; give a number such as 17", reference=reference)
        )
    return int(text), weight


def _weighted(text: str) -> tuple[str, float]:
    """Return what follows a sign and a weight, and the signed weight."""
    sign = _SIGN.match(text)
    factor = -1.0 if sign and sign[0] in _MINUS else 1.0
    number = _WEIGHT.match(text, sign.end() if sign else 0)
    mark = number or sign
    if number:
        factor *= _weight(number[1], text)
    return text[mark.end() :] if mark else text, factor

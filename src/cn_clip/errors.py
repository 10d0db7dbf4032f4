"""Errors that a user can act on: one sentence that names the value and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

MAX_MESSAGE = 300  # characters of any message
_WORD_LIMITS = (80, 60, 40)  # of one value or path in a message that is too long


class CNClipError(Exception):
    """Base of every error that this package raises on purpose. Its text is one short line."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(CNClipError, ValueError):
    """An argument has a value that cannot be used."""


class UnknownNameError(UsageError):
    """A name is not known; the nearest known names are offered."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        known = list(known)
        lowered = {each.lower(): each for each in known}
        near = difflib.get_close_matches(name.lower(), lowered, n=2, cutoff=0.6)
        hint = f"did you mean {' or '.join(lowered[each] for each in near)}? " if near else ""
        super().__init__(f"unknown {what} {name!r}; {hint}available: {', '.join(known)}")


class UnknownModelError(UnknownNameError, RuntimeError):
    """The name of a model is not known. The official package raises a ``RuntimeError`` here."""


class ImageError(CNClipError, ValueError):
    """A picture cannot be decoded, or is refused before it is decoded."""


class DataError(CNClipError, ValueError):
    """Training data cannot be read, or a row of it cannot be used."""


class TrainingError(CNClipError, RuntimeError):
    """A training run cannot go on: its loss is no number, or the model learns nothing."""


class CheckpointError(CNClipError, RuntimeError):
    """Weights cannot be read, or do not fit the model."""


class MissingWeightsError(CheckpointError, FileNotFoundError):
    """No file holds the weights, here or where they could be fetched from."""

    # FileNotFoundError formats (errno, text) pairs; ours is one sentence.
    def __str__(self) -> str:
        return one_line(str(self.args[0]))


def one_line(message: str, *, limit: int = MAX_MESSAGE) -> str:
    """Return a message as one printable line of at most ``limit`` characters.

    Line breaks become spaces and unprintable characters are escaped. If the line is too long, long
    words (base64, paths) are shortened in their middle first, then the line itself, so that its
    start, which names the value, and its end, which names the remedy, both stay.
    """
    line = " ".join(_shortened(message, 100 * limit).split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    for word_limit in _WORD_LIMITS:
        if len(line) <= limit:
            break
        long_word = rf"\S{{{word_limit + 1},}}"
        line = re.sub(long_word, lambda word: _shortened(word[0], word_limit), line)  # noqa: B023
    return _shortened(line, limit)


def _shortened(text: str, limit: int) -> str:
    """Cut the middle out of a text."""
    if len(text) <= limit:
        return text
    head = limit // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"

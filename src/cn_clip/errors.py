"""Errors that a user can act on: one sentence that names the value and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from cn_clip.translation import _

MAX_MESSAGE = 300  # characters of any message
_WORD_LIMITS = (80, 60, 40)  # of one value or path in a message that is too long


class CNClipError(Exception):
    """Base class of all errors of this package. The message is one short line."""

    def __str__(self) -> str:
        return one_line(super().__str__())

    def __reduce__(self) -> Any:
        # Workers send errors. By default they are made anew from their message, which some do not
        # take.
        if isinstance(self, OSError):
            return super().__reduce__()
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[CNClipError], args: tuple[Any, ...], values: dict[str, Any]) -> Any:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(values)
    return error


class UsageError(CNClipError, ValueError):
    """An argument has an invalid value."""


class UnknownNameError(UsageError):
    """A name is unknown; the message suggests the nearest known names."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = list(known)
        by_lower_case = {candidate.lower(): candidate for candidate in known}
        near = difflib.get_close_matches(name.lower(), by_lower_case, n=2, cutoff=0.6)
        hint = (
            _("did you mean {names}? ", names=_(" or ").join(by_lower_case[n] for n in near))
            if near
            else ""
        )
        super().__init__(
            _(
                "unknown {kind} {name!r}; {hint}available: {known}",
                kind=kind,
                name=name,
                hint=hint,
                known=", ".join(known),
            )
        )


class UnknownModelError(UnknownNameError, RuntimeError):
    """A model name is unknown. A ``RuntimeError`` too, as in the official package."""


class ImageError(CNClipError, ValueError):
    """An image is unreadable, or exceeds a limit and is not decoded."""


class DataError(CNClipError, ValueError):
    """A dataset is unreadable, or one of its rows is invalid."""


class UnavailableError(DataError):
    """A file of a dataset cannot be read as a whole: it is missing, was changed, or its server does
    not answer. Later it may be readable again."""


class LibraryError(CNClipError, RuntimeError):
    """A search library is damaged, of another model, or being written by another process."""


class TrainingError(CNClipError, RuntimeError):
    """Training cannot continue: the loss is NaN or infinite, or the model does not learn."""


class CheckpointError(CNClipError, RuntimeError):
    """Weights are unreadable, or do not fit the model."""


class MissingWeightsError(CheckpointError, FileNotFoundError):
    """The weights are neither on this machine nor downloadable."""

    # FileNotFoundError formats (errno, text) pairs; ours is one sentence.
    def __str__(self) -> str:
        return one_line(str(self.args[0]))


def one_line(message: str, *, limit: int = MAX_MESSAGE) -> str:
    """Return a message as one printable line of at most ``limit`` characters.

    Line breaks become spaces and unprintable characters are escaped. In a line that is too long,
    long words (base64, paths) are shortened in the middle, then the line itself: its start names
    the value and its end the remedy.
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
    """Replace the middle of a text that is too long by an ellipsis."""
    if len(text) <= limit:
        return text
    head = limit // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"

"""Errors that a user can act on: one sentence that names the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CNClipError(Exception):
    """Base of every error that this package raises on purpose."""


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
        return str(self.args[0])

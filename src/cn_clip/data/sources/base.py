"""A pair, and the contract of every source of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cn_clip.text import valid_text


@dataclass(frozen=True, slots=True)
class Row:
    """What a pair says of itself; ids are strings, so that ``007`` stays what it is.

    All are valid Unicode: a lone surrogate, half of an emoji, becomes U+FFFD.
    """

    text: str
    image_id: str
    text_id: str

    def __post_init__(self) -> None:
        # Here, because every source makes rows, and everything behind it writes them.
        for name in ("text", "image_id", "text_id"):
            value = getattr(self, name)
            if (valid := valid_text(value)) is not value:
                object.__setattr__(self, name, valid)


@dataclass(frozen=True, slots=True)
class Pair:
    """One picture, as the bytes of its file, with one text."""

    image: bytes
    text: str
    image_id: str
    text_id: str


class Source(Protocol):
    """Pairs that can be read in any order, from any process; opening one reads no picture."""

    name: str
    """The URI that names it."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """Read a pair without its picture.

        Raises:
            DataError: the row cannot be used; it is named with its file and line.
        """
        ...

    def image(self, index: int) -> bytes:
        """Read the bytes of a pair's picture, undecoded.

        Raises:
            DataError: they are not there; the row and the missing file are named.
        """
        ...

    def where(self, index: int) -> str:
        """Name a pair for people: its file, and its line or member."""
        ...

    def unmatched(self) -> list[str]:
        """Say, a sentence each, what is there but makes no pair: a picture without a text, say."""
        ...


def located(source: Source, index: int, error: Exception) -> str:
    """Say what is wrong with a pair, and where it is, unless the error says so itself."""
    said, where = str(error), source.where(index)
    return said if where in said else f"{where}: {said}"


def read_pair(source: Source, index: int) -> Pair:
    """Read a whole pair. Raises what ``row`` and ``image`` raise."""
    row = source.row(index)
    return Pair(source.image(index), row.text, row.image_id, row.text_id)

"""Image-text pairs, and the protocol of their sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cn_clip.text import valid_text


@dataclass(frozen=True, slots=True)
class Row:
    """A pair without its image; ids are strings, so that ``007`` keeps its zeros.

    All fields are valid Unicode: a lone surrogate, half of an emoji, becomes U+FFFD.
    """

    text: str
    image_id: str
    text_id: str

    def __post_init__(self) -> None:
        # Here, because all sources create rows.
        for name in ("text", "image_id", "text_id"):
            value = getattr(self, name)
            if (valid := valid_text(value)) is not value:
                object.__setattr__(self, name, valid)


class Source(Protocol):
    """Pairs in random access, from any process; opening a source reads no image."""

    name: str
    """The URI of the source."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """Read a pair without its image.

        Raises:
            DataError: the row is invalid; the message names its file and line.
        """
        ...

    def image(self, index: int) -> bytes:
        """Read the encoded bytes of a pair's image.

        Raises:
            DataError: the image is missing; the message names the row and the file.
        """
        ...

    def where(self, index: int) -> str:
        """Return the location of a pair for messages: its file, and its line or member."""
        ...

    def unmatched(self) -> list[str]:
        """Return a message for each image, text or file without a pair."""
        ...


def located(source: Source, index: int, error: Exception) -> str:
    """Return the message of an error about a pair, with the pair's location."""
    message, where = str(error), source.where(index)
    return message if where in message else f"{where}: {message}"

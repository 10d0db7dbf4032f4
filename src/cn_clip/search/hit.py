"""A result of a search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Hit:
    """An image that was found.

    Attributes:
        id: of the image in its library.
        path: of its file, absolute; for an image from a source such as ``tar:``, the URI of the
            source, ``#`` and the image id. A path that is not UTF-8 has its bytes percent-encoded.
        cosine: between query and image.
        probability: that the image matches; None if only its text does.
        matches: whether the cosine is above the threshold for "something matches", or the text
            matches.
        why: what matched, the stronger first: ``"image"``, ``"text"`` (in the image),
            ``"caption"``.
        caption: from the source, or None.
        text: recognised in the image, or None.
        copies: paths of other files with the same content.
        uri: ``file://`` URI of the file, which names any bytes exactly; None for a source.
        width, height: in pixels, upright.
        taken: EXIF date such as ``2024-05-01T12:00:00``, or None.
    """

    id: int
    path: str
    cosine: float
    width: int
    height: int
    probability: float | None = None
    matches: bool = True
    why: tuple[str, ...] = ("image",)
    caption: str | None = None
    text: str | None = None
    taken: str | None = None
    copies: tuple[str, ...] = field(default=())
    uri: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "id": self.id,
            "path": self.path,
            "uri": self.uri,
            "cosine": round(self.cosine, 6),
            "probability": None if self.probability is None else round(self.probability, 6),
            "matches": self.matches,
            "why": list(self.why),
            "caption": self.caption,
            "text": self.text,
            "taken": self.taken,
            "width": self.width,
            "height": self.height,
            "copies": list(self.copies),
        }

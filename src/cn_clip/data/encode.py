"""How the pictures of a shard are kept: as they are, or smaller and encoded anew."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from cn_clip.errors import DataError
from cn_clip.image import FORMATS, read_image

_SUFFIXES = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
}


@dataclass(frozen=True, slots=True)
class Encoding:
    """How pictures are kept: as they are, or with ``max_side`` or ``format``, encoded anew.

    ``max_side`` is the longer side in pixels; smaller pictures stay as they are. ``quality`` is
    that of JPEG and WebP.
    """

    max_side: int | None = None
    format: Literal["JPEG", "WEBP"] | None = None
    quality: int = 92


AS_THEY_ARE = Encoding()


def encoded(content: bytes, encoding: Encoding) -> tuple[bytes, str]:
    """Return a picture's bytes as they are to be kept, and the suffix that fits them."""
    if encoding.max_side is None and encoding.format is None:
        return content, _suffix(content)
    image = read_image(content)
    small = encoding.max_side is None or max(image.size) <= encoding.max_side
    if small and encoding.format is None:
        return content, _suffix(content)
    if encoding.max_side is not None and not small:
        side = encoding.max_side
        if image.mode in ("P", "1"):  # a palette cannot be filtered
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
    name: str = encoding.format or "JPEG"
    if image.has_transparency_data and name == "JPEG":
        name = "PNG"  # which keeps it
    elif name != "PNG":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    stream = io.BytesIO()
    image.save(stream, name, quality=encoding.quality)
    return stream.getvalue(), _SUFFIXES[name]


def _suffix(content: bytes) -> str:
    """Tell the format from the header."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return _SUFFIXES[str(image.format)]
    except Exception:
        raise DataError(
            f"its {len(content):,} bytes are no picture in a known format ({', '.join(FORMATS)})"
        ) from None

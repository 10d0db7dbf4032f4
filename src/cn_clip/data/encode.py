"""Encode the images of a shard: unchanged, or resized and re-encoded."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from cn_clip.errors import DataError, ImageError, UsageError
from cn_clip.image.decode import FORMATS, describe, formats_of, read_image
from cn_clip.image.limits import check_file
from cn_clip.translation import _

_SUFFIXES = {
    "JPEG": ".jpg",
    "MPO": ".jpg",  # a JPEG of a camera, with a preview or a depth map after it
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "AVIF": ".avif",
    "HEIF": ".heic",
}


_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
_MAX_SIDE = {"JPEG": 65_500, "WEBP": 16_383}  # pixels, a limit of the format


@dataclass(frozen=True, slots=True)
class Encoding:
    """How images are encoded; by default their bytes stay unchanged.

    Attributes:
        max_side: longer images are resized to this longer side, in pixels.
        format: all images are re-encoded in this format.
        quality: of JPEG and WebP, from 0 to 100.

    Raises:
        UsageError: the side or the quality is out of range.
    """

    max_side: int | None = None
    format: Literal["JPEG", "WEBP"] | None = None
    quality: int = 92

    def __post_init__(self) -> None:
        if self.max_side is not None and self.max_side < 1:
            raise UsageError(
                _(
                    "a longer side of {max_side} pixels is none; give 1 or more",
                    max_side=self.max_side,
                )
            )
        if not 0 <= self.quality <= 100:
            raise UsageError(_("the quality is {quality}; give 0 to 100", quality=self.quality))


UNCHANGED = Encoding()


def encode_image(content: bytes, encoding: Encoding) -> tuple[bytes, str]:
    """Return the encoded bytes of an image, and the file suffix of their format.

    If the format cannot hold the image (transparent JPEG, too long WebP), another one is used.

    Raises:
        ImageError: the image cannot be decoded or re-encoded.
        DataError: the image is to stay unchanged, but its format is unknown.
    """
    if encoding.max_side is None and encoding.format is None:
        return content, _suffix(content)
    image = read_image(content)
    small = encoding.max_side is None or max(image.size) <= encoding.max_side
    if small and encoding.format is None:
        return content, _suffix(content)
    if encoding.max_side is not None and not small:
        side = encoding.max_side
        if image.mode in ("P", "PA", "1"):  # a palette cannot be filtered
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
    name = _format_for(image, encoding.format or "JPEG")
    stream = io.BytesIO()
    try:
        if name != "PNG" or image.mode not in _PNG_MODES:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image.save(stream, name, quality=encoding.quality)
    except (OSError, ValueError, MemoryError) as error:  # from the encoder
        reason = str(error) or type(error).__name__
        raise ImageError(
            _(
                "an image of {width} x {height} pixels cannot be written as {name} ({reason}); "
                "make it smaller with --max-side",
                width=image.width,
                height=image.height,
                name=name,
                reason=reason,
            )
        ) from error
    return stream.getvalue(), _SUFFIXES[name]


def _format_for(image: Image.Image, wanted: str) -> str:
    """Return the wanted format, or one that can hold the image."""
    side = max(image.size)
    if wanted == "WEBP" and side <= _MAX_SIDE["WEBP"]:
        return "WEBP"
    if image.has_transparency_data or side > _MAX_SIDE["JPEG"]:
        return "PNG"
    return "JPEG"


def _suffix(content: bytes) -> str:
    """Return the file suffix of the format in the header."""
    check_file(content, describe(content))
    try:
        with Image.open(io.BytesIO(content), formats=formats_of(content)) as image:
            return _SUFFIXES[str(image.format)]
    except Exception:
        raise DataError(
            _(
                "its {size:,} bytes are not an image in a known format ({formats})",
                size=len(content),
                formats=", ".join(FORMATS),
            )
        ) from None

"""One image read for a library: its digest, pixels, facts and thumbnail."""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from cn_clip.backends.pipeline import PreparedImage
from cn_clip.config import ModelConfig
from cn_clip.data.curate.perceptual_hash import hash_image
from cn_clip.image.decode import MAX_PIXELS, decoded_image, formats_of, to_pixels

DIGEST_BYTES = 16
THUMBNAIL_SIDE = 320  # pixels of the longer side
_QUALITY = 80  # of WebP
_TAKEN = (ExifTags.Base.DateTimeOriginal, ExifTags.Base.DateTimeDigitized)


@dataclass(frozen=True, slots=True)
class ReadImage:
    """An image ready to be embedded, and what the library keeps of it.

    Attributes:
        pixels: for the model, uint8 (3, S, S).
        width, height: in pixels, upright.
        taken: EXIF date, ISO 8601 without time zone.
        position: latitude and longitude in degrees.
        look: perceptual hash.
        thumbnail: WebP; None if not asked for.
    """

    pixels: PreparedImage
    width: int
    height: int
    taken: str | None
    position: tuple[float, float] | None
    look: bytes
    thumbnail: bytes | None


def digest_of(content: bytes) -> bytes:
    """Return the digest that identifies a file's content."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def read_image_facts(
    content: bytes,
    config: ModelConfig,
    *,
    fast_decode: bool = False,
    max_pixels: int = MAX_PIXELS,
    thumbnail: bool = True,
) -> ReadImage:
    """Decode an image once, for the model and for the library.

    Args:
        content: of the file.
        config: of the model.
        fast_decode: as in ``cn_clip.load``.
        max_pixels: as in ``cn_clip.load``.
        thumbnail: whether to make one.

    Raises:
        ImageError: the image is damaged or refused.
    """
    size = config.vision.resolution
    with decoded_image(
        content,
        max_pixels=max_pixels,
        fast_decode=size if fast_decode else None,
        background=config.background,
    ) as image:
        pixels = to_pixels(image, size)
        small = _thumbnail(image) if thumbnail else None
        width, height = image.size
    taken, position, stored_size = _exif(content)
    if fast_decode and stored_size is not None:  # decoded at reduced size
        swapped = (width > height) != (stored_size[0] > stored_size[1])
        width, height = stored_size[::-1] if swapped else stored_size
    return ReadImage(
        np.ascontiguousarray(np.moveaxis(pixels, -1, 0)),
        width,
        height,
        taken,
        position,
        hash_image(Image.fromarray(pixels)).tobytes(),
        small,
    )


def make_thumbnail(content: bytes, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """Return the thumbnail of an image: WebP, at most ``THUMBNAIL_SIDE`` pixels wide and high.

    Raises:
        ImageError: the image is damaged or refused.
    """
    with decoded_image(content, max_pixels=max_pixels, fast_decode=THUMBNAIL_SIDE) as image:
        return _thumbnail(image)


def _thumbnail(image: Image.Image) -> bytes:
    small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), reducing_gap=2.0)
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=_QUALITY, method=2)
    return stream.getvalue()


def exif_facts(content: bytes) -> tuple[str | None, tuple[float, float] | None]:
    """Return the date and the position that a file states; None for what it does not."""
    return _exif(content)[:2]


def _exif(content: bytes) -> tuple[str | None, tuple[float, float] | None, tuple[int, int] | None]:
    """Return the date, the position and the size that a file states.

    Metadata of cameras is often damaged: anything unreadable is None.
    """
    try:
        with Image.open(io.BytesIO(content), formats=formats_of(content)) as image:
            size = image.size
            exif = image.getexif()
            details: dict[int, Any] = dict(exif.get_ifd(ExifTags.IFD.Exif))
            gps: dict[int, Any] = dict(exif.get_ifd(ExifTags.IFD.GPSInfo))
            date = exif.get(ExifTags.Base.DateTime)
    # Untrusted bytes reach a third-party parser: Pillow raises nearly every kind of exception.
    except Exception:
        return None, None, None
    dates = [*(details.get(tag) for tag in _TAKEN), date]
    return next(filter(None, map(_date, dates)), None), _position(gps), size


def _date(value: Any) -> str | None:
    """Parse ``2024:05:01 12:00:00``; cameras without a set clock write zeros or spaces."""
    try:
        text = str(value).strip().rstrip("\0")[:19]
        return datetime.strptime(text, "%Y:%m:%d %H:%M:%S").isoformat()
    except ValueError:
        return None


def _position(gps: dict[int, Any]) -> tuple[float, float] | None:
    try:
        latitude = _degrees(gps[ExifTags.GPS.GPSLatitude], gps[ExifTags.GPS.GPSLatitudeRef])
        longitude = _degrees(gps[ExifTags.GPS.GPSLongitude], gps[ExifTags.GPS.GPSLongitudeRef])
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    inside = math.isfinite(latitude) and abs(latitude) <= 90 and abs(longitude) <= 180
    return (latitude, longitude) if inside else None


def _degrees(parts: Any, reference: Any) -> float:
    degrees, minutes, seconds = (float(part) for part in parts)
    value = degrees + minutes / 60 + seconds / 3600
    return -value if str(reference).strip("\0 ").upper() in ("S", "W") else value

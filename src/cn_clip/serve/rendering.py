"""Images of a library as they leave the server: without EXIF, GPS and other metadata."""

from __future__ import annotations

import io

from PIL import Image

from cn_clip.image.decode import decoded_image

MAX_SIDE = 4096
_QUALITY = 90


def rendered(content: bytes, *, max_side: int = MAX_SIDE) -> tuple[bytes, str]:
    """Return an image encoded anew, and its media type.

    It is upright, and at most ``max_side`` pixels wide and high. Only pixels survive: no comment,
    profile, thumbnail or trailing data can tell where it was taken.

    Raises:
        ImageError: the image is damaged or refused.
    """
    with decoded_image(content, fast_decode=max_side) as image:
        transparent = image.has_transparency_data
        plain = image.convert("RGBA" if transparent else "RGB")
    plain.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    stream = io.BytesIO()
    if transparent:
        plain.save(stream, "WEBP", quality=_QUALITY, method=2)
        return stream.getvalue(), "image/webp"
    plain.save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue(), "image/jpeg"


def media_type(content: bytes) -> str:
    """Return the media type of an encoded image; never one that a browser could run."""
    for magic, kind in (
        (b"\xff\xd8", "image/jpeg"),
        (b"\x89PNG", "image/png"),
        (b"GIF8", "image/gif"),
        (b"BM", "image/bmp"),
        (b"II*\0", "image/tiff"),
        (b"MM\0*", "image/tiff"),
    ):
        if content.startswith(magic):
            return kind
    return "image/webp" if content[8:12] == b"WEBP" else "application/octet-stream"

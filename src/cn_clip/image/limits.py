"""Limits of time and memory for decoding, checked before pixels are decoded.

Pillow checks the number of pixels only. A small file can still claim tables of millions of entries,
thousands of scans, or a mode whose decoder keeps several copies.
"""

from __future__ import annotations

import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import Image

from cn_clip.errors import ImageError
from cn_clip.translation import _

MAX_DECODED = 2**30  # bytes of all decoders of a process at once
MAX_ENCODED = 600_000_000  # bytes of a file or record; uncompressed RGBA of MAX_PIXELS is 537 MB
MAX_BASE64 = MAX_ENCODED // 3 * 4 + 1024  # characters of its base64, with an id or a prefix

# Peak bytes per pixel, measured with Pillow 13. WebP keeps two canvases, the frame and the image;
# libtiff a strip and the image; AVIF and HEIF the planes, the pixels and the image. 8: the image
# and one copy (rotated, or on a background).
_BYTES_PER_PIXEL = {"WEBP": 16, "AVIF": 24, "HEIF": 20}
_MIN_BYTES_PER_PIXEL = 8
_BYTES_PER_SIDE = 32  # of the resize filter: four doubles per pixel of the side

_MAX_SCANNED = 2**31  # pixels of all scans of a JPEG, about 4 s
_MAX_SEGMENTS = 1 << 12  # of a JPEG before its pixels
_MAX_HEADER = 1 << 24  # bytes of these segments: Pillow joins EXIF segments in quadratic time
_MAX_JUNK = 1 << 20  # bytes between segments, which Pillow skips one by one
_MAX_CHUNKS = 1 << 18  # of a PNG
_MAX_COMMENTS = (
    1 << 21
)  # bytes before the first frame of a GIF, which Pillow joins in quadratic time
_MAX_ENTRIES = 1 << 19  # of a table in a TIFF: as many 16 x 16 tiles as MAX_PIXELS has
_MAX_TAGS = 1 << 12
_MAX_EXIF = 1 << 24
_MAX_RLE = 1 << 24  # bytes of a run-length BMP, which Pillow decodes in Python
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in a scan, 0 and restarts follow 0xff too
_FILL = re.compile(rb"\xff+")  # fill bytes before a marker
_BYTE_TYPES = (1, 2, 6, 7)  # TIFF tag types that are read as bytes, not as a tuple of numbers


def check_file(content: bytes, name: str) -> None:
    """Check for structures that slow down a parser before it knows the image size.

    Raises:
        ImageError: there are more of them than in any ordinary file, or the file is too large.
    """
    if len(content) > MAX_ENCODED:
        limit = _("above the limit of {limit:,} bytes", limit=MAX_ENCODED)
        raise ImageError(_("{name} is {limit}; make it smaller first", name=name, limit=limit))
    for magic, check in _CHECKS:
        if content.startswith(magic):
            if (problem := check(content)) is not None:
                raise ImageError(
                    _(
                        "{name} {problem}; save it again with an image editor",
                        name=name,
                        problem=problem,
                    )
                )
            return


def check_opened(image: Image.Image, content: bytes, name: str) -> None:
    """Check the opened header of a file for content that makes decoding slow.

    Raises:
        ImageError: decoding would take more than a few seconds, or too much memory.
    """
    problem = None
    pixels = image.width * image.height
    exif = image.info.get("exif") or b""  # None in a HEIC without any
    if len(exif) > _MAX_EXIF:
        problem = _("holds {size:,} bytes of EXIF data", size=len(exif))
    elif image.format == "BMP" and len(content) > _MAX_RLE:
        if any(tile.codec_name == "bmp_rle" for tile in getattr(image, "tile", ())):
            problem = _("is a run-length encoded BMP of {size:,} bytes", size=len(content))
    elif image.format in ("JPEG", "MPO") and content.count(b"\xff\xda") > 16:
        scans = _scans(content)
        if scans * pixels > _MAX_SCANNED or scans > 4 * _MAX_SEGMENTS:
            problem = _("has {scans:,} scans over {pixels:,} pixels", scans=scans, pixels=pixels)
    if problem is not None:
        raise ImageError(
            _("{name} {problem}; save it again with an image editor", name=name, problem=problem)
        )


def decoding_bytes(image: Image.Image) -> int:
    """Return the peak bytes of decoding and resizing an image, an upper bound."""
    pixels = image.width * image.height
    per_pixel = _BYTES_PER_PIXEL.get(image.format or "", _MIN_BYTES_PER_PIXEL)
    layers = getattr(image, "layer", ())  # (id, horizontal, vertical sampling, table) of a JPEG
    if layers and image.info.get("progressive"):  # all coefficients are kept until the last scan
        largest = max(layer[1] for layer in layers) * max(layer[2] for layer in layers)
        samples = sum(layer[1] * layer[2] for layer in layers) / max(1, largest)
        per_pixel = max(per_pixel, round(4 + 2 * samples))
    cost = max(pixels * per_pixel, max(image.size) * _BYTES_PER_SIDE)
    return max(cost, _tile_bytes(image))


def _tile_bytes(image: Image.Image) -> int:
    """Return the bytes of a tile of a TIFF, which may be larger than the image."""
    tags = getattr(image, "tag_v2", {})
    width, height, samples = (tags.get(tag, 1) for tag in (322, 323, 277))
    if not all(isinstance(value, int) for value in (width, height, samples)):
        return 0  # several values: libtiff refuses them
    return int(width * height * samples) * 4


class MemoryBudget:
    """A memory budget shared by threads; a thread waits until its bytes are free.

    A request above the whole budget reserves all of it.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._reset()
        if hasattr(os, "register_at_fork"):  # a forked worker has no other threads
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._free = self._size
        self._changed = threading.Condition()

    @contextmanager
    def reserved(self, amount: int) -> Iterator[None]:
        amount = min(amount, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()


def _jpeg(content: bytes) -> str | None:
    at, segments, junk = 2, 0, 0
    while at + 4 <= len(content):
        match = _FILL.search(content, at)
        if match is None:
            junk, end = junk + len(content) - at, len(content)
        else:
            end = match.end()
            junk += end - at - 1
        segments += 1
        if junk > _MAX_JUNK:
            return _("has a JPEG header with more than a megabyte of junk between its segments")
        if segments > _MAX_SEGMENTS:
            return _("has a JPEG header of more than {limit:,} segments", limit=_MAX_SEGMENTS)
        if at > _MAX_HEADER:
            return _("has a JPEG header of more than {limit:,} bytes", limit=_MAX_HEADER)
        if end >= len(content) or content[end] in (0xDA, 0xD9):
            return None
        alone = content[end] in (0x00, 0x01) or 0xD0 <= content[end] <= 0xD8
        at = end + 1
        if not alone:
            at += max(2, int.from_bytes(content[at : at + 2], "big"))
    return None


def _scans(content: bytes) -> int:
    """Count the scans of a JPEG; segments are skipped, as they may contain another JPEG."""
    at, scans = 2, 0
    while (match := _MARKER.search(content, at)) is not None:
        marker, at = content[match.start() + 1], match.end()
        if marker == 0xD9:
            break
        scans += marker == 0xDA
        at += max(2, int.from_bytes(content[at : at + 2], "big"))
    return scans


def _png(content: bytes) -> str | None:
    if len(content) < 12 * _MAX_CHUNKS:
        return None
    at, chunks = 8, 0
    while at + 8 <= len(content):
        at += 12 + int.from_bytes(content[at : at + 4], "big")
        chunks += 1
        if chunks > _MAX_CHUNKS:
            return _("has more than {limit:,} PNG chunks", limit=_MAX_CHUNKS)
    return None


def _gif(content: bytes) -> str | None:
    if len(content) < _MAX_COMMENTS:
        return None
    flags = content[10]
    begin = at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while at + 2 <= len(content) and content[at] != 0x2C:
        at += 2 if content[at] == 0x21 else 1
        while content[at - 1 : at] != b"\0" and at < len(content) and content[at]:
            at += 1 + content[at]
        at += 1
        if at - begin > _MAX_COMMENTS:
            return _("has more than two megabytes of comments before its first frame")
    return None


def _tiff(content: bytes) -> str | None:
    order = "<" if content[:2] == b"II" else ">"
    big = content[2:4] in (b"\x2b\0", b"\0\x2b")
    head, entry, size = ("Q", "HHQ", 20) if big else ("H", "HHL", 12)
    try:
        (at,) = struct.unpack_from(order + ("Q" if big else "L"), content, 8 if big else 4)
        (tags,) = struct.unpack_from(order + head, content, at)
        if tags > _MAX_TAGS:
            return _("has a TIFF directory of {tags:,} tags", tags=tags)
        at += struct.calcsize(order + head)
        for number in range(tags):
            tag, kind, count = struct.unpack_from(order + entry, content, at + size * number)
            if kind not in _BYTE_TYPES and count > _MAX_ENTRIES:
                return _("has {count:,} values of TIFF tag {tag}", count=count, tag=tag)
    except struct.error:
        return None  # cut short: Pillow names it
    return None


_CHECKS: tuple[tuple[bytes, Callable[[bytes], str | None]], ...] = (
    (b"\xff\xd8", _jpeg),
    (b"\x89PNG", _png),
    (b"GIF8", _gif),
    (b"II", _tiff),
    (b"MM", _tiff),
)

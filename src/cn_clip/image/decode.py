"""Images to pixels: safe decoding, and exactly the preprocessing that the weights saw.

Pillow decodes and resizes, numpy normalises; nothing here needs torch.
"""

from __future__ import annotations

import errno
import io
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from cn_clip import files
from cn_clip.config import CLIP_MEAN, CLIP_STD
from cn_clip.errors import ImageError, UsageError
from cn_clip.files import as_path, find, passed_over, walk
from cn_clip.image.limits import (
    MAX_DECODED,
    MAX_FILE,
    Room,
    check_file,
    check_opened,
    decoding_bytes,
)
from cn_clip.image.modes import depth_of, eight_bits, from_array, strips

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 2**27  # 134 million, 537 MB decoded; above every camera in common use

# Pillow warns at a size of its own; our limit is checked on every picture. For the whole process,
# because pictures are read in threads, where changing filters back and forth is not safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

ImageInput = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]

_ROOM = Room(MAX_DECODED)
# How files of these formats begin in base64: JPEG, PNG, WebP, GIF and TIFF.
_BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|UklGR|R0lGOD|SUkqA|TU0AK)[A-Za-z0-9+/=_\s-]{24,}")


def read_image(
    source: ImageInput,
    *,
    max_pixels: int = MAX_PIXELS,
    fast_decode: int | None = None,
    background: str | None = None,
) -> Image.Image:
    """Decode an image and turn it upright.

    Args:
        source: a path, the bytes of a file, a PIL image, or an array of shape (H, W), (H, W, 3) or
            (H, W, 4) of uint8, uint16, bool, or float in 0 to 1. Files may be JPEG, PNG, WebP, GIF
            (first frame), BMP or TIFF.
        max_pixels: larger images are refused from their header, before they are decoded. Beyond
            twice ``PIL.Image.MAX_IMAGE_PIXELS`` Pillow refuses them whatever this says.
        fast_decode: the side, in pixels, that the image will be resized to. JPEG files are then
            decoded at 1/2, 1/4 or 1/8 size where that leaves twice the side. Several times faster
            on camera images; the pixels differ slightly, so embeddings do too.
        background: a colour to lay transparent pixels on; by default the alpha channel stays.

    Returns:
        An image of 8 bits a channel, in a mode that converts to RGB. 16-bit grey is divided by
        257, float in 0 to 1 multiplied by 255. Of what a file says of itself only the transparent
        colour is kept: comments and profiles change no pixel here, and damaged ones break saving.

    Raises:
        ImageError: the image is missing, damaged, too large or of another format, or its values
            are of an unknown range.
    """
    name = describe(source)
    image = _open(source, name)
    _check_size(image, name, max_pixels)
    return _decoded(image, source, name, fast_decode, background)


def read_pixels(
    source: ImageInput,
    size: int,
    *,
    max_pixels: int = MAX_PIXELS,
    fast_decode: bool = False,
    background: str | None = None,
) -> npt.NDArray[np.uint8]:
    """Decode an image and squash it to ``size`` x ``size``: uint8 of shape (size, size, 3).

    Threads that do this at one time hold at most ``MAX_DECODED`` bytes together: large images pass
    one by one. The rest is as for ``read_image``.
    """
    name = describe(source)
    image = _open(source, name)
    _check_size(image, name, max_pixels)
    fast = size if fast_decode else None
    with _ROOM.taken(decoding_bytes(image)):
        decoded = _decoded(image, source, name, fast, background)
        with _damage_named(name):
            return to_pixels(decoded, size)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of an image file; nothing but a regular file is opened.

    Raises:
        ImageError: there is none, it cannot be read, or it is larger than any image.
    """
    name = str(path)
    if name.startswith(("http://", "https://")):
        raise ImageError(f"{name} is a web address; download the picture and give its path")
    if not name.strip():
        raise ImageError("the path of an image is empty; give the path of a file")
    if name.startswith("data:"):
        raise ImageError(f"{name} is no usable path; decode the data: URI's base64 first")
    try:
        return files.read_file(path, MAX_FILE)
    except (OSError, ValueError) as error:
        raise ImageError(_unreadable(name, error)) from None


def to_pixels(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """Squash an image to ``size`` x ``size``: uint8 of shape (size, size, 3).

    As the official preprocessing does it: 16-bit and float values are clipped at 255. What
    ``read_image`` returns has none.
    """
    # PIL bicubic before RGB: the pixels these weights saw. Palette and 16-bit pictures come out
    # differently the other way round.
    small = image.resize((size, size), Image.Resampling.BICUBIC)
    small.info.pop("transparency", None)  # RGB has none, and a damaged one breaks the conversion
    return np.asarray(small.convert("RGB"))


def normalize(
    pixels: npt.NDArray[np.uint8],
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> npt.NDArray[np.float32]:
    """Return ``(pixels / 255 - mean) / std``: uint8 (..., H, W, 3) to float32 (..., 3, H, W)."""
    channels_first = np.ascontiguousarray(np.moveaxis(pixels, -1, -3)).astype(np.float32)
    channels_first /= np.float32(255)
    channels_first -= np.asarray(mean, dtype=np.float32)[:, None, None]
    channels_first /= np.asarray(std, dtype=np.float32)[:, None, None]
    return channels_first


def find_images(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Expand files, folders (searched through, linked ones too) and globs to image files, sorted.

    Files of other formats are passed over, with a warning that counts them.

    Raises:
        ImageError: a path does not exist, or a folder or glob holds no image.
    """
    found: dict[Path, None] = {}  # ordered, without repeats
    for given in paths:
        if not str(given).strip():
            raise ImageError("a path is empty; give a file, a folder or a pattern")
        try:
            path = as_path(given)
        except UsageError as error:
            raise ImageError(str(error)) from None
        inside, notes = _expand(path)
        if not inside and path.is_dir():
            raise ImageError(
                "; ".join(
                    [f"the folder {str(given)!r} holds no picture ({', '.join(SUFFIXES)})", *notes]
                )
            )
        if not inside:
            raise ImageError(
                "; ".join([f"no such file, folder or pattern with matches: {str(given)!r}", *notes])
            )
        for note in notes:
            warnings.warn(note, stacklevel=2)
        found.update(dict.fromkeys(inside))
    return list(found)


def describe(source: Any) -> str:
    """Name a source in a few words, for messages."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    if isinstance(source, bytes | bytearray):
        return f"picture of {len(source):,} bytes"
    return f"{type(source).__name__} picture"


def _expand(path: Path) -> tuple[list[Path], list[str]]:
    """Return the images that a path stands for, and notes on the files that are passed over."""
    notes: list[str] = []
    if path.is_dir():
        listing = walk(path)
        listed, notes = listing.files, listing.closed
    elif path.exists() or not any(c in str(path) for c in "*?["):
        return [path] if path.exists() else [], notes
    else:
        listed = [each for each in find(str(path)) if each.suffix or each.is_file()]
    if passed := passed_over(listed, SUFFIXES, path):
        notes.append(passed)
    return [each for each in listed if each.suffix.lower() in SUFFIXES], notes


def _open(source: ImageInput, name: str) -> Image.Image:
    """Read the header only; the pixels stay undecoded."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return from_array(source)
    if isinstance(source, bytes | bytearray):
        content = bytes(source)
    elif isinstance(source, str | os.PathLike):
        content = read_file(source)
    else:
        raise ImageError(
            f"{source!r:.60} is not a picture; give a path, bytes, a PIL image or a uint8 array"
        )
    check_file(content, name)
    with _damage_named(name):
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError as error:
            claimed = re.search(r"\d+", str(error))
            raise ImageError(
                f"{name} claims {int(claimed[0]) if claimed else 0:,} pixels, above every limit; "
                "make it smaller first"
            ) from None
        except UnidentifiedImageError:
            if _BASE64.match(content[:256].decode("latin-1")):
                raise ImageError(f"{name} is base64; it must be decoded first") from None
            raise ImageError(
                f"{name} is not a picture in a known format ({', '.join(FORMATS)}); convert it "
                "first"
            ) from None
        check_opened(image, content, name)
    return image


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    size = f"{name} has {image.width} x {image.height} pixels"
    if not image.width * image.height:
        raise ImageError(f"{size}: it is empty; replace it")
    if image.width * image.height > max_pixels:
        raise ImageError(f"{size}, above the limit of {max_pixels:,}; make it smaller first")
    if (needed := decoding_bytes(image)) > MAX_DECODED:
        raise ImageError(
            f"{size}, which take {needed:,} bytes to decode as {image.format or image.mode}, above "
            f"the limit of {MAX_DECODED:,}; make it smaller, or convert it to JPEG, first"
        )


def _decoded(
    image: Image.Image,
    source: ImageInput,
    name: str,
    fast_decode: int | None,
    background: str | None,
) -> Image.Image:
    with _damage_named(name):
        if fast_decode is not None and image is not source:  # draft() would change a caller's image
            # Twice the side keeps enough detail for the bicubic filter.
            image.draft("RGB", (2 * fast_decode, 2 * fast_decode))
        image.load()
        depth = depth_of(image)
        if image is source:
            image = ImageOps.exif_transpose(image)  # a copy: the caller's stays as it is
        else:
            ImageOps.exif_transpose(image, in_place=True)
        image.info = {k: v for k, v in image.info.items() if k == "transparency"}
        image = eight_bits(image, name, depth)
        return image if background is None else _flatten(image, background)


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into an ``ImageError``.

    This is where bytes that nobody vouches for reach a parser that is not ours. Damaged files make
    it raise nearly every kind of exception, so every kind is caught.
    """
    try:
        yield
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(f"{name} takes more memory than there is; make it smaller first") from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"{name} is damaged ({reason}); replace the file") from error


def _unreadable(name: str, error: OSError | ValueError) -> str:
    """Say why a path cannot be read; base64 is often given in place of one."""
    too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    if _BASE64.match(name) or (too_long and re.fullmatch(r"[A-Za-z0-9+/=_\s-]+", name)):
        return f"{name} is no usable path; base64 must be decoded first"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"no such file: {name}"
    reason = error.strerror if isinstance(error, OSError) else error
    return f"{name} cannot be read: {reason}"


def _flatten(image: Image.Image, background: str) -> Image.Image:
    if not image.has_transparency_data:
        return image
    flat = Image.new("RGB", image.size)
    for box in strips(image.size):  # whole, the layers would take several times the memory
        layer = image.crop(box).convert("RGBA")
        under = Image.new("RGBA", layer.size, background)
        flat.paste(Image.alpha_composite(under, layer).convert("RGB"), box[:2])
    return flat

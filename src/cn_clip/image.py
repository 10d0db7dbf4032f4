"""Pictures to pixels: safe decoding, and exactly the preprocessing that the weights saw.

Pillow decodes and resizes, numpy normalises; nothing here needs torch.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from cn_clip.config import CLIP_MEAN, CLIP_STD
from cn_clip.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 2**27  # 134 million, 400 MB decoded; above every camera in common use

# Pillow warns at a size of its own; our limit is checked on every picture. For the whole process,
# because pictures are read in threads, where changing filters back and forth is not safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

ImageInput = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]


def read_image(
    source: ImageInput,
    *,
    max_pixels: int = MAX_PIXELS,
    fast_decode: int | None = None,
    background: str | None = None,
) -> Image.Image:
    """Decode a picture and turn it upright.

    Args:
        source: a path, the bytes of a file, a PIL image, or a uint8 array of shape (H, W),
            (H, W, 3) or (H, W, 4). Files may be JPEG, PNG, WebP, GIF (first frame), BMP or TIFF.
        max_pixels: larger pictures are refused from their header, before they are decoded. Beyond
            twice ``PIL.Image.MAX_IMAGE_PIXELS`` Pillow refuses them whatever this says.
        fast_decode: the side, in pixels, that the picture will be resized to. JPEG files are then
            decoded at 1/2, 1/4 or 1/8 size where that leaves twice the side. Several times faster
            on camera pictures; the pixels differ slightly, so embeddings do too.
        background: a colour to lay transparent pixels on; by default the alpha channel stays.

    Raises:
        ImageError: the picture is missing, damaged, too large or of another format.
    """
    name = describe(source)
    image = _open(source, name)
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{name} has {image.width} x {image.height} pixels, above the limit of {max_pixels:,}; "
            "make it smaller first"
        )
    if fast_decode is not None and image is not source:  # draft() would change a caller's image
        # Twice the side keeps enough detail for the bicubic filter.
        image.draft("RGB", (2 * fast_decode, 2 * fast_decode))
    try:
        image.load()
        if image is source:
            image = ImageOps.exif_transpose(image)  # a copy: the caller's stays as it is
        else:
            ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise ImageError(f"{name} is damaged ({error}); replace the file") from error
    return image if background is None else _flatten(image, background)


def to_pixels(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """Squash a picture to ``size`` x ``size``: uint8 of shape (size, size, 3)."""
    # PIL bicubic before RGB: the pixels these weights saw. Palette and 16-bit pictures come out
    # differently the other way round.
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB"))


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
    """Expand files, folders (searched through) and globs to picture files, in sorted order.

    Raises:
        ImageError: a path does not exist, or a folder or glob holds no picture.
    """
    found: dict[Path, None] = {}  # ordered, without repeats
    for given in paths:
        if not str(given).strip():
            raise ImageError("a path is empty; give a file, a folder or a pattern")
        try:
            inside = _expand(Path(given).expanduser())
        except (OSError, ValueError, RuntimeError) as error:  # too long, no such user, bad pattern
            raise ImageError(f"{str(given)!r:.80} is no usable path: {error}") from None
        if not inside and Path(given).is_dir():
            raise ImageError(f"the folder {str(given)!r} holds no picture ({', '.join(SUFFIXES)})")
        if not inside:
            raise ImageError(f"no such file, folder or pattern with matches: {str(given)!r}")
        found.update(dict.fromkeys(inside))
    return list(found)


def describe(source: Any) -> str:
    """Name a source in a few words, for messages."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    if isinstance(source, bytes | bytearray):
        return f"picture of {len(source):,} bytes"
    return f"{type(source).__name__} picture"


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if path.exists():
        return [path]
    if not any(c in str(path) for c in "*?["):
        return []
    anchor = Path(path.anchor)
    matches = anchor.glob(str(path.relative_to(anchor)))
    return sorted(p for p in matches if p.suffix.lower() in SUFFIXES)


def _open(source: ImageInput, name: str) -> Image.Image:
    """Read the header only; the pixels stay undecoded."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes | bytearray):
        stream = io.BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        stream = _read_file(source, name)
    else:
        raise ImageError(
            f"{source!r:.60} is not a picture; give a path, bytes, a PIL image or a uint8 array"
        )
    try:
        return Image.open(stream, formats=FORMATS)
    except Image.DecompressionBombError as error:
        claimed = re.search(r"\d+", str(error))
        raise ImageError(
            f"{name} claims {int(claimed[0]) if claimed else 0:,} pixels, above every limit; "
            "make it smaller first"
        ) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is not a picture in a known format ({', '.join(FORMATS)}); convert it first"
        ) from None
    except Exception as error:
        raise ImageError(f"{name} is damaged ({error}); replace the file") from error


def _read_file(source: str | os.PathLike[str], name: str) -> io.BytesIO:
    if name.startswith(("http://", "https://")):
        raise ImageError(f"{name} is a web address; download the picture and give its path")
    if not name.strip():
        raise ImageError("the path of an image is empty; give the path of a file")
    try:
        path = Path(source)
        if path.exists() and not path.is_file():
            raise ImageError(f"{name} is not a file; give the path of a picture")
        return io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        raise ImageError(f"no such file: {name}") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} cannot be read: {error}") from error


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shape_fits or not array.size:
        raise ImageError(
            f"an array of dtype {array.dtype} and shape {array.shape} is not a picture; expected "
            "uint8 of shape (H, W), (H, W, 3) or (H, W, 4)"
        )
    return Image.fromarray(array)


def _flatten(image: Image.Image, background: str) -> Image.Image:
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")

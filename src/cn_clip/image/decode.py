"""Safe image decoding, and the exact preprocessing of the published weights.

Pillow decodes and resizes, numpy normalises; torch is not needed.
"""

from __future__ import annotations

import errno
import io
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from cn_clip import files
from cn_clip.config import CLIP_MEAN, CLIP_STD
from cn_clip.errors import ImageError, UsageError
from cn_clip.files import as_path, find, of_suffixes, skipped_files, walk
from cn_clip.image.limits import (
    MAX_DECODED,
    MAX_ENCODED,
    MemoryBudget,
    check_file,
    check_opened,
    decoding_bytes,
)
from cn_clip.image.modes import depth_of, from_array, strips, to_eight_bits
from cn_clip.translation import _

# Pillow may be built without AVIF; HEIC is read by pillow-heif.
_AVIF = find_spec("PIL._avif") is not None
_HEIF = find_spec("pillow_heif") is not None
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF",
    *(("AVIF",) if _AVIF else ()),
    *(("HEIF",) if _HEIF else ()),
)  # fmt: skip
SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    *((".avif",) if _AVIF else ()),
    *((".heic", ".heif", ".hif") if _HEIF else ()),
)  # fmt: skip
MAX_PIXELS = 2**27  # 134 million, 537 MB decoded; above common cameras

# Pillow warns at its own limit; ours is checked for every image. Process-wide, because images are
# decoded in threads, and warning filters are not thread-safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

if TYPE_CHECKING:
    from torch import Tensor

    ImageInput = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any] | Tensor
else:
    ImageInput = str | os.PathLike | bytes | Image.Image | np.ndarray

_BUDGET = MemoryBudget(MAX_DECODED)
_HEIC_STARTS = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis"))
# The base64 of the first bytes of JPEG, PNG, WebP, GIF and TIFF.
_BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|UklGR|R0lGOD|SUkqA|TU0AK)[A-Za-z0-9+/=_\s-]{24,}")


def read_image(
    source: ImageInput,
    *,
    max_pixels: int = MAX_PIXELS,
    fast_decode: int | None = None,
    background: str | None = None,
) -> Image.Image:
    """Decode an image and apply its EXIF orientation.

    Args:
        source: a path, the bytes of a file, a PIL image, or an array of shape (H, W), (H, W, 3) or
            (H, W, 4) of uint8, uint16, bool, or float in 0 to 1. Files may be JPEG, PNG, WebP, GIF
            (first frame), BMP, TIFF, AVIF if Pillow has it, or HEIC if pillow-heif is installed.
        max_pixels: larger images are refused before decoding. Pillow refuses images above twice
            ``PIL.Image.MAX_IMAGE_PIXELS`` regardless.
        fast_decode: the side, in pixels, that the image will be resized to. JPEG files are then
            decoded at 1/2, 1/4 or 1/8 size if that leaves at least twice the side. Several times
            faster on camera images; pixels and embeddings differ slightly.
        background: colour behind transparent pixels; by default the alpha channel is kept.

    Returns:
        An image of 8 bits per channel, in a mode that converts to RGB. 16-bit grey is divided by
        257, float in 0 to 1 multiplied by 255. Metadata is dropped, except the transparent colour:
        comments and profiles do not change pixels here, and damaged ones break saving.

    Raises:
        ImageError: the image is missing, damaged, too large, of another format, or of an unknown
            value range.
    """
    name = describe(source)
    image = _open_image(source, name)
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
    """Decode an image and resize it to ``size`` x ``size``: uint8 (size, size, 3).

    The aspect ratio is not kept. Concurrent threads use at most ``MAX_DECODED`` bytes in total:
    large images are decoded one at a time. Otherwise as ``read_image``.
    """
    with decoded_image(
        source,
        max_pixels=max_pixels,
        fast_decode=size if fast_decode else None,
        background=background,
    ) as image:
        return to_pixels(image, size)


@contextmanager
def decoded_image(
    source: ImageInput,
    *,
    max_pixels: int = MAX_PIXELS,
    fast_decode: int | None = None,
    background: str | None = None,
) -> Iterator[Image.Image]:
    """Yield the image of ``read_image``, within the memory that all threads may use to decode.

    Errors of Pillow in the body are an ``ImageError`` too.
    """
    name = describe(source)
    image = _open_image(source, name)
    _check_size(image, name, max_pixels)
    with _BUDGET.reserved(decoding_bytes(image)):
        decoded = _decoded(image, source, name, fast_decode, background)
        with _map_decode_errors(name):
            yield decoded


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of an image file, which must be a regular file.

    Raises:
        ImageError: the file is missing, unreadable or too large.
    """
    name = str(path)
    _refuse_url(name)
    if not name.strip():
        raise ImageError(_("the path of an image is empty; give the path of a file"))
    if name.startswith("data:"):
        raise ImageError(
            _("{name} is not a path; decode the base64 of the data: URI first", name=name)
        )
    try:
        return files.read_file(path, MAX_ENCODED)
    except (OSError, ValueError) as error:
        raise ImageError(_unreadable(name, error)) from None


def _refuse_url(name: str) -> None:
    if name.startswith(("http://", "https://")):
        raise ImageError(_("{name} is a URL; download the image and give its path", name=name))


def to_pixels(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """Resize an image to ``size`` x ``size``: uint8 (size, size, 3).

    The aspect ratio is not kept. 16-bit and float values are clipped at 255, as in the official
    preprocessing; ``read_image`` returns none of these.
    """
    # PIL bicubic before RGB: the pixels these weights saw. The reverse order changes palette and
    # 16-bit images.
    small = image.resize((size, size), Image.Resampling.BICUBIC)
    small.info.pop("transparency", None)  # a damaged one breaks the conversion
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
    """Expand files, folders (recursively, following links) and globs to image files, sorted.

    Files of other formats are skipped, with a warning that counts them.

    Raises:
        ImageError: a path does not exist, or a folder or glob holds no image.
    """
    images: dict[Path, None] = {}  # an ordered set
    for given in paths:
        if not str(given).strip():
            raise ImageError(_("a path is empty; give a file, a folder or a glob"))
        _refuse_url(str(given))
        try:
            path = as_path(given)
        except UsageError as error:
            raise ImageError(str(error)) from None
        inside, notes = _expand(path)
        if not inside and path.is_dir():
            raise ImageError(
                "; ".join(
                    [
                        _(
                            "the folder {given!r} holds no image ({formats})",
                            given=str(given),
                            formats=", ".join(FORMATS),
                        ),
                        *notes,
                    ]
                )
            )
        if not inside:
            raise ImageError(
                "; ".join(
                    [_("no such file, folder or glob match: {given!r}", given=str(given)), *notes]
                )
            )
        for note in notes:
            warnings.warn(note, stacklevel=2)
        images.update(dict.fromkeys(inside))
    return list(images)


def formats_of(content: bytes) -> tuple[str, ...]:
    """Return the formats for ``Image.open`` to try; pillow-heif is imported at its first file."""
    if not _HEIF:
        return FORMATS
    if content[4:8] != b"ftyp":  # the start of HEIC, AVIF and MP4
        return FORMATS[:-1]
    _register_heif()
    return FORMATS


@cache
def _register_heif() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()


def describe(source: Any) -> str:
    """Return a short description of a source, for messages."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    if isinstance(source, bytes | bytearray):
        return _("image of {size:,} bytes", size=len(source))
    return _("{source_type} image", source_type=type(source).__name__)


def _expand(path: Path) -> tuple[list[Path], list[str]]:
    """Return the images at a path, and warnings about skipped files and unreadable folders."""
    notes: list[str] = []
    if path.is_dir():
        listing = walk(path)
        files, notes = listing.files, listing.unreadable
    elif path.exists() or not any(c in str(path) for c in "*?["):
        return [path] if path.exists() else [], notes
    else:
        files = [match for match in find(str(path)) if match.suffix or match.is_file()]
    skipped = skipped_files(files, SUFFIXES, path)
    return of_suffixes(files, SUFFIXES), [
        *notes,
        *([skipped] if skipped else []),
    ]


def _open_image(source: ImageInput, name: str) -> Image.Image:
    """Open an image without decoding its pixels."""
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
            _(
                "{source!r:.60} is not an image; give a path, bytes, a PIL image or a uint8 array",
                source=source,
            )
        )
    check_file(content, name)
    with _map_decode_errors(name):
        try:
            image = Image.open(io.BytesIO(content), formats=formats_of(content))
        except Image.DecompressionBombError as error:
            claimed = re.search(r"\d+", str(error))
            raise ImageError(
                _(
                    "{name} claims {pixels:,} pixels, above all limits; make it smaller first",
                    name=name,
                    pixels=int(claimed[0]) if claimed else 0,
                )
            ) from None
        except UnidentifiedImageError:
            if _BASE64.match(content[:256].decode("latin-1")):
                raise ImageError(_("{name} is base64; decode it first", name=name)) from None
            if not _HEIF and content[4:12] in _HEIC_STARTS:
                raise ImageError(
                    _(
                        "{name} is a HEIC image, which needs pillow-heif: pip install pillow-heif",
                        name=name,
                    )
                ) from None
            raise ImageError(
                _(
                    "{name} is not an image in a known format ({formats}); convert it first",
                    name=name,
                    formats=", ".join(FORMATS),
                )
            ) from None
        check_opened(image, content, name)
    return image


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    size = _(
        "{name} has {width} x {height} pixels", name=name, width=image.width, height=image.height
    )
    if not image.width * image.height:
        raise ImageError(_("{size}: it is empty; replace it", size=size))
    if image.width * image.height > max_pixels:
        raise ImageError(
            _(
                "{size}, above the limit of {max_pixels:,}; make it smaller first",
                size=size,
                max_pixels=max_pixels,
            )
        )
    if (needed := decoding_bytes(image)) > MAX_DECODED:
        raise ImageError(
            _(
                "{size}, which take {needed:,} bytes to decode as {format}, above the limit of "
                "{limit:,}; make it smaller, or convert it to JPEG, first",
                size=size,
                needed=needed,
                format=image.format or image.mode,
                limit=MAX_DECODED,
            )
        )


def _decoded(
    image: Image.Image,
    source: ImageInput,
    name: str,
    fast_decode: int | None,
    background: str | None,
) -> Image.Image:
    with _map_decode_errors(name):
        # draft() would change a caller's image; of HEIC, it decodes an embedded thumbnail.
        if fast_decode is not None and image is not source and image.format in ("JPEG", "MPO"):
            # Twice the side keeps enough detail for the bicubic filter.
            image.draft("RGB", (2 * fast_decode, 2 * fast_decode))
        image.load()
        depth = depth_of(image)
        if image is source:
            image = ImageOps.exif_transpose(image)  # a copy: the caller's image stays unchanged
        else:
            ImageOps.exif_transpose(image, in_place=True)
        image.info = {k: v for k, v in image.info.items() if k == "transparency"}
        image = to_eight_bits(image, name, depth)
        return image if background is None else _flatten(image, background)


@contextmanager
def _map_decode_errors(name: str) -> Iterator[None]:
    """Turn any exception of Pillow into an ``ImageError``.

    Untrusted bytes reach a third-party parser here: on damaged files it raises nearly every kind of
    exception.
    """
    try:
        yield
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(
            _("{name} needs more memory than available; make it smaller first", name=name)
        ) from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImageError(
            _("{name} is damaged ({reason}); replace the file", name=name, reason=reason)
        ) from error


def _unreadable(name: str, error: OSError | ValueError) -> str:
    """Return why a path cannot be read; a common mistake is base64 instead of a path."""
    too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    if _BASE64.match(name) or (too_long and re.fullmatch(r"[A-Za-z0-9+/=_\s-]+", name)):
        return _("{name} is not a path but base64; decode it first", name=name)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return _("no such file: {name}", name=name)
    reason = error.strerror if isinstance(error, OSError) else error
    return _("{name} cannot be read: {reason}", name=name, reason=reason)


def _flatten(image: Image.Image, background: str) -> Image.Image:
    if not image.has_transparency_data:
        return image
    flat = Image.new("RGB", image.size)
    for box in strips(image.size):  # by strips: the layers take several times the memory
        layer = image.crop(box).convert("RGBA")
        under = Image.new("RGBA", layer.size, background)
        flat.paste(Image.alpha_composite(under, layer).convert("RGB"), box[:2])
    return flat

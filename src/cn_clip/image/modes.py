"""Convert any image to 8 bits per channel; 16-bit and float values are scaled.

Pillow clips values at 255 instead, which makes 16-bit images white.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from cn_clip.errors import ImageError
from cn_clip.translation import N_, _, translate

DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # more than 8 bits a pixel, one channel
_EIGHT_BIT = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_STRIP = 1 << 22  # pixels converted at once
_SIXTEEN = 65_535
_BITS, _PHOTOMETRIC = 258, 262  # tags of a TIFF


@dataclass(frozen=True, slots=True)
class Depth:
    """The stored bits of the grey values, if the file states them, and whether 0 is white."""

    bits: int | None = None
    inverted: bool = False


def depth_of(image: Image.Image) -> Depth:
    """Read the depth of a newly opened image; copies of it lose the information."""
    if image.format == "PNG":
        return Depth(16)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS)
    bits = bits[0] if isinstance(bits, tuple) and bits else bits
    return Depth(bits if isinstance(bits, int) else None, tags.get(_PHOTOMETRIC) == 0)


def to_eight_bits(image: Image.Image, name: str, depth: Depth) -> Image.Image:
    """Convert an image to 8 bits per channel, in a mode that converts to RGB; most are unchanged.

    16-bit grey is divided by 257, float in 0 to 1 multiplied by 255, LAB converted to sRGB.

    Raises:
        ImageError: the value range does not define black and white, or the mode is unknown.
    """
    if image.mode in _EIGHT_BIT:
        return image
    if image.mode in DEEP:
        return _grey(image, name, depth)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # None only with inPlace=True
        return converted
    unpremultiplied = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    if unpremultiplied is None:
        raise ImageError(
            _("{name} has mode {mode}; convert it to RGB first", name=name, mode=image.mode)
        )
    return image.convert(unpremultiplied)


def from_array(array: npt.NDArray[Any]) -> Image.Image:
    """Convert an array (H, W), (H, W, 3) or (H, W, 4) to an image of 8 bits per channel.

    uint8 is unchanged, uint16 is divided by 257, float in 0 to 1 multiplied by 255, and True is
    white.

    Raises:
        ImageError: the shape, dtype or value range is not supported.
    """
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    name = _("an array of dtype {dtype} and shape {shape}", dtype=array.dtype, shape=array.shape)
    if not shape_fits or not array.size or array.dtype.kind not in "buf":
        raise ImageError(
            _(
                "{name} is not an image; expected {expected}",
                name=name,
                expected=translate(_EXPECTED),
            )
        )
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    if array.dtype == bool:
        return Image.fromarray(np.where(array, np.uint8(255), np.uint8(0)))
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        return Image.fromarray(_scaled(array, _SIXTEEN))
    if array.dtype.kind != "f":
        raise ImageError(
            _(
                "{name} is not an image; expected {expected}",
                name=name,
                expected=translate(_EXPECTED),
            )
        )
    _check_unit(name, float(array.min()), float(array.max()))
    return Image.fromarray(_unit_scaled(array))


_EXPECTED = N_("uint8, uint16, bool, or float in 0 to 1, of shape (H, W), (H, W, 3) or (H, W, 4)")


def _grey(image: Image.Image, name: str, depth: Depth) -> Image.Image:
    low, high = _range(image)
    if image.mode == "F":
        _check_unit(_("{name}, of mode F (float),", name=name), low, high)
    top = _SIXTEEN if image.mode != "I" else _white_level(name, low, high, depth)
    if depth.bits == 12 and high < 4096:
        top = 4095
    clear = image.info.get("transparency")
    grey = Image.new("L", image.size)
    alpha = Image.new("L", image.size, 255) if isinstance(clear, int) else None
    for upper, values in _strips(image):
        pixels = _unit_scaled(values) if image.mode == "F" else _scaled(values, top)
        if depth.inverted and image.mode != "F":
            pixels = 255 - pixels
        grey.paste(Image.fromarray(pixels), (0, upper))
        if alpha is not None:
            opaque = np.where(values == clear, np.uint8(0), np.uint8(255))
            alpha.paste(Image.fromarray(opaque), (0, upper))
    return grey if alpha is None else Image.merge("LA", (grey, alpha))


def _range(image: Image.Image) -> tuple[float, float]:
    """Return the minimum and maximum value; NaN if there is one."""
    pairs = [(values.min(), values.max()) for _, values in _strips(image)]
    return float(np.min([low for low, _ in pairs])), float(np.max([high for _, high in pairs]))


def _white_level(name: str, low: float, high: float, depth: Depth) -> int:
    """Return the white level of an image of mode I (32-bit integers)."""
    sixteen = depth.bits == 16 or high > 255 or high == 0
    if low < 0 or high > _SIXTEEN or not sixteen:
        raise ImageError(
            _(
                "{name}, of mode I (32-bit integers), holds values from {low:.0f} to {high:.0f}, "
                "which does not define white; convert it to 8 bits (mode L) first",
                name=name,
                low=low,
                high=high,
            )
        )
    return _SIXTEEN


def _check_unit(name: str, low: float, high: float) -> None:
    if np.isnan(low) or np.isnan(high) or np.isinf(low) or np.isinf(high):
        raise ImageError(_("{name} holds NaN or infinite values; replace them first", name=name))
    if low < 0 or high > 1:
        raise ImageError(
            _(
                "{name} holds values from {low:.6g} to {high:.6g}; scale them to 0 to 1, or "
                "convert them to 8 bits, first",
                name=name,
                low=low,
                high=high,
            )
        )


def _strips(image: Image.Image) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield (first row, rows) of an image in strips: one array of all rows would be large."""
    for _unused, upper, _unused, lower in strips(image.size):
        yield upper, np.asarray(image.crop((0, upper, image.width, lower)))


def strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes (left, top, right, bottom) of the full width, of up to 4 million pixels each."""
    width, height = size
    rows = max(1, _STRIP // max(1, width))
    for upper in range(0, height, rows):
        yield 0, upper, width, min(height, upper + rows)


def _scaled(values: npt.NDArray[Any], top: int) -> npt.NDArray[np.uint8]:
    """Scale integers from 0 to ``top`` to 0 to 255, rounded."""
    wide = values.astype(np.uint32)
    return ((wide * 255 + top // 2) // top).astype(np.uint8)


def _unit_scaled(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.rint(values.astype(np.float32) * 255).astype(np.uint8)

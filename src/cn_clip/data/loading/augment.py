"""The image augmentation of the official training, with an explicit random generator.

The official training used ``timm.data.create_transform`` with ``auto_augment="original"``: a
random bicubic resized crop, a horizontal flip with probability 0.5, and the ImageNet policy of
AutoAugment (Cubuk et al. 2019, https://arxiv.org/abs/1805.09501). The same random numbers give
the same pixels here.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from cn_clip.config import CLIP_MEAN
from cn_clip.errors import UsageError
from cn_clip.translation import _

# Pairs of (operation, probability, level of 0 to 10). The five repeated pairs and the Equalize of
# probability 0 are the paper's.
POLICY: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 4), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 7)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, 2)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 8), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 2)),
    (("Equalize", 0.0, 7), ("Equalize", 0.8, 8)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 8)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 9)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 3)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
)
SIGNED_OPS = ("Rotate", "ShearX")  # in either direction with equal probability
FILL_COLOUR = tuple(round(255 * mean) for mean in CLIP_MEAN)  # empty corners: 0 after normalisation
CROP_ATTEMPTS = 10
KEPT_AREA = (0.9, 1.0)  # fraction of the area in a crop; elongated images can lose more

# Only Generator.random() is called: numpy may change its other methods between versions.


def generator_for(seed: int, epoch: int, id: str) -> np.random.Generator:
    """Return the random generator of one image in one epoch.

    It depends on nothing else: reading order, number of workers and resuming within an epoch do
    not change an image's augmentation.
    """
    # Unique for each triple: only the id may hold colons. It may also hold lone surrogates.
    name = f"{int(seed)}:{int(epoch)}:{id}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def augment(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    *,
    flip: bool = False,
) -> npt.NDArray[np.uint8]:
    """Crop, resize and recolour an image for training: uint8 (size, size, 3).

    Args:
        image: of any size and any mode that Pillow decodes to; it is not modified.
        size: side of the result in pixels.
        rng: source of all randomness; see ``generator_for``.
        flip: flip half of the images, as the official training did. Off by default: flipped
            Chinese characters are unreadable, and 左 (left) becomes 右 (right).

    Raises:
        UsageError: ``size`` is out of range.
    """
    square = random_resized_crop(image, size, rng, scale=KEPT_AREA)
    if flip and rng.random() < 0.5:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Bicubic before RGB, as without augmentation; the operations below need RGB. Pillow would warn
    # about the transparency of a palette before dropping it.
    square.info.pop("transparency", None)
    square = square.convert("RGB")
    return np.asarray(auto_augment(square, rng))


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """Crop a random box and resize it to ``size`` x ``size``, in the image's own mode.

    ``scale`` and ``ratio`` are those of ``crop_box``.

    Raises:
        UsageError: ``size``, ``scale`` or ``ratio`` is out of range.
    """
    if size < 1:
        raise UsageError(
            _("an image cannot have a side of {size}; give 1 pixel or more", size=size)
        )
    box = crop_box(image.width, image.height, rng, scale=scale, ratio=ratio)
    # Not resize(box=...), whose filter reads pixels outside the box at its edges.
    return image.crop(box).resize((size, size), Image.Resampling.BICUBIC)


def crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw a random crop box: (left, top, right, bottom), in pixels.

    Its fraction of the area is uniform in ``scale``, its width / height log-uniform in ``ratio``.
    Few such boxes fit an elongated image. After 10 that do not fit, the largest centred box within
    ``ratio`` is returned: all of a 4:3 image, two thirds of a 2:1 image.

    Raises:
        UsageError: ``scale`` or ``ratio`` is not an ascending pair of positive numbers, or
            ``scale`` exceeds 1.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UsageError(
            _("scale {scale} is not a range of fractions; give 0 < min <= max <= 1", scale=scale)
        )
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise UsageError(
            _("ratio {ratio} is not a range of width / height; give 0 < min <= max", ratio=ratio)
        )
    for _unused in range(CROP_ATTEMPTS):
        area = width * height * _uniform(rng, *scale)
        shape = math.exp(_uniform(rng, math.log(ratio[0]), math.log(ratio[1])))
        # A small fraction of a small image can round to 0.
        wide = max(1, round(math.sqrt(area * shape)))
        high = max(1, round(math.sqrt(area / shape)))
        if wide <= width and high <= height:
            top = int((height - high + 1) * rng.random())
            left = int((width - wide + 1) * rng.random())
            return left, top, left + wide, top + high
    wide = max(1, min(width, round(height * ratio[1])))
    high = max(1, min(height, round(width / ratio[0])))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def auto_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Apply a random pair of ``POLICY`` to an RGB image, each operation with its probability.

    Raises:
        UsageError: an operation was drawn and the image is not RGB.
    """
    for name, probability, level in POLICY[int(len(POLICY) * rng.random())]:
        if rng.random() < probability:
            negative = name in SIGNED_OPS and rng.random() > 0.5
            image = apply_op(image, name, level, negative=negative)
    return image


def apply_op(image: Image.Image, name: str, level: float, *, negative: bool = False) -> Image.Image:
    """Apply one operation to an RGB image at a level of 0 to 10.

    AutoContrast, Equalize and Invert ignore ``level``. Level 10 rotates by 30 degrees and shears
    by 0.3, ``negative`` in the opposite direction; other operations ignore ``negative``. Posterize
    keeps 4 (level 0) to 8 bits; Solarize inverts values above a threshold of 0 to 256; Color,
    Contrast and Sharpness range from 0.1 to 1.9, where 1 is the identity.

    Raises:
        UsageError: the operation is unknown, the level is out of range, or the image is not RGB.
    """
    if not 0 <= level <= 10:
        raise UsageError(_("{name} has no level {level}; give 0 to 10", name=name, level=level))
    if image.mode != "RGB":
        raise UsageError(
            _("{name} needs an RGB image, not {mode}; convert it first", name=name, mode=image.mode)
        )
    strength = level / 10
    sign = -1 if negative else 1
    match name:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Posterize":
            return ImageOps.posterize(image, 4 + int(strength * 4))
        case "Solarize":
            return ImageOps.solarize(image, int(strength * 256))
        case "Color":
            return ImageEnhance.Color(image).enhance(0.1 + strength * 1.8)
        case "Contrast":
            return ImageEnhance.Contrast(image).enhance(0.1 + strength * 1.8)
        case "Sharpness":
            return ImageEnhance.Sharpness(image).enhance(0.1 + strength * 1.8)
        case "Rotate":
            return image.rotate(
                sign * strength * 30, Image.Resampling.BICUBIC, fillcolor=FILL_COLOUR
            )
        case "ShearX":
            matrix = (1, sign * strength * 0.3, 0, 0, 1, 0)  # output to input coordinates
            return image.transform(
                image.size,
                Image.Transform.AFFINE,
                matrix,
                Image.Resampling.BICUBIC,
                fillcolor=FILL_COLOUR,
            )
    known = ", ".join(sorted({op for pair in POLICY for op, _, _ in pair}))
    raise UsageError(_("unknown operation {name!r}; available: {known}", name=name, known=known))


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()

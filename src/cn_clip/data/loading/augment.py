"""Training pictures: the augmentation of the official training, drawn from a named generator.

The official training took ``timm.data.create_transform`` with ``auto_augment="original"``: a random
crop resized with bicubic, a mirror image half of the time, and the ImageNet policy of AutoAugment
(Cubuk et al. 2019, https://arxiv.org/abs/1805.09501). The steps here make the same pixels from
the same draws.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from cn_clip.config import CLIP_MEAN
from cn_clip.errors import UsageError

# Pairs of operations, each with its probability and its level of 0 to 10. That five pairs stand
# twice and one Equalize never comes about is the paper's.
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
TWO_WAY = ("Rotate", "ShearX")  # either direction, as often
FILL = tuple(round(255 * mean) for mean in CLIP_MEAN)  # bare corners: 0 once normalised
CROP_ATTEMPTS = 10

# Of a generator only random() is called: numpy may change its other draws between versions.


def generator_for(seed: int, epoch: int, id: str) -> np.random.Generator:
    """Return the generator of one picture in one epoch.

    It depends on nothing else: the order of reading, the number of workers and a restart in the
    middle of an epoch leave every picture's draws as they are.
    """
    # Two numbers end where their colons stand, so no two triples share a name. A lone surrogate
    # can come out of a JSON file and must not stop a run.
    name = f"{int(seed)}:{int(epoch)}:{id}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def augment(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    *,
    flip: bool = False,
    auto_augment: bool = True,
    scale: tuple[float, float] = (0.9, 1.0),
) -> npt.NDArray[np.uint8]:
    """Crop, resize and recolour a picture for training: uint8 of shape (size, size, 3).

    Args:
        image: of any size, and any mode that Pillow decodes a file to; it stays as it is.
        size: the side of the result, in pixels.
        rng: decides everything; see ``generator_for``.
        flip: mirror half of the pictures. The official training did. Off here, because mirrored
            Chinese characters are no characters, and no 左 is a 右.
        auto_augment: apply one of the pairs of ``POLICY``.
        scale: least and greatest share of the area to keep; oblong pictures can lose more, see
            ``crop_box``.

    Raises:
        UsageError: ``size`` or ``scale`` cannot be used.
    """
    square = random_resized_crop(image, size, rng, scale=scale)
    if flip and rng.random() < 0.5:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Bicubic before RGB, as without augmentation; the operations below need RGB. What a palette
    # says of transparency goes first: Pillow would warn of it and then drop it.
    square.info.pop("transparency", None)
    square = square.convert("RGB")
    return np.asarray(_auto_augment(square, rng) if auto_augment else square)


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """Cut out a random part and squash it to ``size`` x ``size``, in the picture's own mode.

    ``scale`` and ``ratio`` are those of ``crop_box``.

    Raises:
        UsageError: ``size``, ``scale`` or ``ratio`` cannot be used.
    """
    if size < 1:
        raise UsageError(f"a picture cannot have a side of {size}; give 1 pixel or more")
    box = crop_box(image.width, image.height, rng, scale=scale, ratio=ratio)
    # Two steps: resize(box=...) would let pixels from outside the box into its edge.
    return image.crop(box).resize((size, size), Image.Resampling.BICUBIC)


def crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw the part of a picture to keep: (left, top, right, bottom), in pixels.

    Its share of the area is uniform in ``scale``, its width / height log-uniform in ``ratio``. Few
    such boxes fit a picture of other than square shape. After 10 that do not, the largest centred
    part whose shape lies within ``ratio`` is taken: all of a 4:3 picture, two thirds of a 2:1.

    Raises:
        UsageError: ``scale`` or ``ratio`` is not a pair of positive numbers in order, or ``scale``
            exceeds 1.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UsageError(f"scale {scale} is no range of shares; give 0 < least <= greatest <= 1")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise UsageError(f"ratio {ratio} is no range of width / height; give 0 < least <= greatest")
    for _ in range(CROP_ATTEMPTS):
        area = width * height * _between(rng, *scale)
        shape = math.exp(_between(rng, math.log(ratio[0]), math.log(ratio[1])))
        # A small share of a small picture can round to nothing.
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
    """Apply a pair of operations drawn from ``POLICY`` to an RGB picture, each by its probability.

    Raises:
        UsageError: an operation was due and the picture is not RGB.
    """
    for name, probability, level in POLICY[int(len(POLICY) * rng.random())]:
        if rng.random() < probability:
            negative = name in TWO_WAY and rng.random() > 0.5
            image = apply_op(image, name, level, negative=negative)
    return image


_auto_augment = auto_augment  # ``augment`` has an option of the same name


def apply_op(image: Image.Image, name: str, level: float, *, negative: bool = False) -> Image.Image:
    """Return an RGB picture with one operation applied at a level of 0 to 10.

    AutoContrast, Equalize and Invert have no strength and do not look at ``level``. Level 10 turns
    by 30 degrees and shears by 0.3; ``negative`` turns and shears the other way, and is nothing to
    the rest. Posterize keeps 4 (level 0) to 8 bits, Solarize inverts what is at least 0 to 256;
    Color, Contrast and Sharpness go from 0.1 to 1.9, where 1 changes nothing.

    Raises:
        UsageError: the operation or the level is not known, or the picture is not RGB.
    """
    if not 0 <= level <= 10:
        raise UsageError(f"level {level} is not one of {name}'s; give 0 to 10")
    if image.mode != "RGB":
        raise UsageError(f"{name} needs an RGB picture, not {image.mode}; convert it first")
    share = level / 10
    sign = -1 if negative else 1
    match name:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Posterize":
            return ImageOps.posterize(image, 4 + int(share * 4))
        case "Solarize":
            return ImageOps.solarize(image, int(share * 256))
        case "Color":
            return ImageEnhance.Color(image).enhance(0.1 + share * 1.8)
        case "Contrast":
            return ImageEnhance.Contrast(image).enhance(0.1 + share * 1.8)
        case "Sharpness":
            return ImageEnhance.Sharpness(image).enhance(0.1 + share * 1.8)
        case "Rotate":
            return image.rotate(sign * share * 30, Image.Resampling.BICUBIC, fillcolor=FILL)
        case "ShearX":
            slanted = (1, sign * share * 0.3, 0, 0, 1, 0)  # x of the source from x and y here
            return image.transform(
                image.size,
                Image.Transform.AFFINE,
                slanted,
                Image.Resampling.BICUBIC,
                fillcolor=FILL,
            )
    known = ", ".join(sorted({op for pair in POLICY for op, _, _ in pair}))
    raise UsageError(f"unknown operation {name!r}; available: {known}")


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()

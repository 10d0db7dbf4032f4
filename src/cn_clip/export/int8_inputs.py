"""What int8 is calibrated on: real images and texts, never those of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.backends.pipeline import PreparedImage, unit_length
from cn_clip.config import ModelConfig
from cn_clip.embedder import Embedder
from cn_clip.errors import UsageError
from cn_clip.image.decode import ImageInput, normalize
from cn_clip.sample import embedded_sample
from cn_clip.translation import _

MIN_IMAGES = 32
_MAX_IMAGES = 300  # as NNCF's default; further ones hardly change the ranges

Batch = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Prepared images and token ids of texts.

    Attributes:
        images: float32 (1, 3, S, S), normalised.
        texts: int64 (1, L).
    """

    images: list[Batch]
    texts: list[Batch]


def calibration_of(
    original: Embedder, images: Sequence[ImageInput], texts: Sequence[str]
) -> Calibration:
    """Prepare the given images, or those of the sample in the package, and its texts besides.

    Raises:
        UsageError: there are fewer than ``MIN_IMAGES`` images.
        ImageError: an image is unreadable.
    """
    sample = embedded_sample()
    if 0 < len(images) < MIN_IMAGES:
        raise UsageError(
            _(
                "int8 is calibrated on at least {least} images, {given} were given; give more, or "
                "none for the sample in the package",
                least=MIN_IMAGES,
                given=len(images),
            )
        )
    used = evenly(list(images) or sample.images, _MAX_IMAGES)
    ids = original.prepare_texts(evenly([*sample.texts, *texts], _MAX_IMAGES))
    return Calibration(
        images=[_normalised(original.prepare_image(image), original.config) for image in used],
        texts=[np.array([text_ids], np.int64) for text_ids in ids],
    )


def loss(features: Batch, expected: Batch) -> float:
    """Return the mean of 1 - cosine of features (N, D) to the expected ones."""
    cosines = np.einsum("nd,nd->n", unit_length(features), unit_length(expected))
    return float(1 - np.nan_to_num(cosines).mean())


def _normalised(prepared: PreparedImage, config: ModelConfig) -> Batch:
    pixels = np.moveaxis(prepared, 0, -1)[None]  # (1, S, S, 3)
    return normalize(pixels, config.image_mean, config.image_std)


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most ``count`` items, evenly spaced."""
    step = max(1.0, len(items) / count)
    return [items[int(n * step)] for n in range(min(count, len(items)))]

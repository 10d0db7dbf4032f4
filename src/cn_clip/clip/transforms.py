"""The steps of the official preprocessing, as in ``preprocess.transforms``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cn_clip.config import CLIP_MEAN, CLIP_STD
from cn_clip.image.decode import read_image


@dataclass(frozen=True, slots=True)
class Resize:
    """Squash a PIL image to ``size`` (H, W)."""

    size: tuple[int, int]
    interpolation: Image.Resampling = Image.Resampling.BICUBIC

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.resize(self.size[::-1], self.interpolation)


@dataclass(frozen=True, slots=True)
class OnBackground:
    """Apply the EXIF orientation, and put transparent images on a colour."""

    background: str

    def __call__(self, image: Image.Image) -> Image.Image:
        return read_image(image, background=self.background)


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Drop the alpha channel, resolve palettes; after resizing, as in training."""
    return image.convert("RGB")


@dataclass(frozen=True, slots=True)
class ToTensor:
    """PIL image to a float32 tensor (3, H, W) between 0 and 1."""

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # (3, H, W)
        return torch.from_numpy(pixels).float().div(255)


@dataclass(frozen=True, slots=True)
class Normalize:
    """``(pixels - mean) / std`` for each channel of a tensor (3, H, W)."""

    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

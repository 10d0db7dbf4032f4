"""Batches for a backend: decoding ahead, order, texts batched by length, unit length."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cn_clip.config import ModelConfig
from cn_clip.errors import ImageError
from cn_clip.image.decode import MAX_PIXELS, ImageInput, read_image, read_pixels
from cn_clip.translation import _

_MAX_PADDING = 4  # tokens; fewer are not worth a batch of their own
_MAX_COPIED_PIXELS = 1 << 22  # a larger PIL image is prepared at once instead of copied

PreparedImage = npt.NDArray[np.uint8]  # (3, S, S)


@dataclass(frozen=True, slots=True)
class ImagePreparation:
    """Image to pixels: decode, apply EXIF orientation, squash to the model's resolution."""

    config: ModelConfig
    fast_decode: bool = False
    max_pixels: int = MAX_PIXELS

    def __call__(self, source: ImageInput) -> PreparedImage:
        """Return uint8 pixels (3, S, S).

        Raises:
            ImageError: the image is unreadable or refused.
        """
        pixels = read_pixels(
            source,
            self.config.vision.resolution,
            max_pixels=self.max_pixels,
            fast_decode=self.fast_decode,
            background=self.config.background,
        )
        return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))


def iter_images(images: ImageInput | Iterable[ImageInput]) -> Iterator[ImageInput]:
    """Yield one image, or each of several; a 4-dimensional array is a batch of images."""
    if isinstance(images, np.ndarray):
        yield from [images] if images.ndim < 4 else images
    elif isinstance(images, str | os.PathLike | bytes | bytearray | Image.Image):
        yield images
    elif not isinstance(images, Iterable):
        raise ImageError(
            _("{images!r:.60} is neither an image nor a list of images", images=images)
        )
    else:
        yield from images


def prepare_ahead(
    pool: ThreadPoolExecutor,
    prepare: Callable[[ImageInput], PreparedImage],
    images: Iterable[ImageInput],
    depth: int,
) -> Generator[PreparedImage | ImageError]:
    """Yield prepared images, or their errors, in order; prepare at most ``depth`` ahead."""

    def attempt(image: ImageInput) -> PreparedImage | ImageError:
        try:
            return prepare(image)
        except ImageError as error:
            return error

    waiting: deque[Future[PreparedImage | ImageError]] = deque()
    try:
        for image in images:
            if not isinstance(image, Image.Image):
                waiting.append(pool.submit(attempt, image))
            elif image.width * image.height > _MAX_COPIED_PIXELS:
                waiting.append(_done(attempt(image)))
            else:
                # PIL images decode lazily and not thread-safely: decode here. An unreadable one
                # fails again in attempt().
                with suppress(ImageError):
                    image = read_image(image)
                waiting.append(pool.submit(attempt, image))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # after an error or Ctrl-C, stop decoding
        for future in waiting:
            future.cancel()


def _done(result: PreparedImage | ImageError) -> Future[PreparedImage | ImageError]:
    future: Future[PreparedImage | ImageError] = Future()
    future.set_result(result)
    return future


def batches_by_length(
    lengths: Sequence[int], *, max_rows: int, max_tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Yield (indexes, padded length) of batches of texts, the longest texts first.

    A batch has at most ``max_rows`` texts and ``max_tokens`` tokens, padding included. No text is
    padded by more than a quarter of the longest, or ``_MAX_PADDING`` tokens.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    while by_length:
        longest = lengths[by_length[0]]
        count = max(1, min(max_rows, max_tokens // longest))
        shortest = longest - max(_MAX_PADDING, longest // 4)
        batch = [i for i in by_length[:count] if lengths[i] >= shortest]
        yield batch, longest
        by_length = by_length[len(batch) :]


def unit_length(features: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return features (N, D) divided by their norm, as float32; zeros stay zeros."""
    features = features.astype(np.float32, copy=False)
    norms = np.sqrt(np.square(features).sum(axis=-1, keepdims=True))
    unit: npt.NDArray[np.float32] = features / np.maximum(norms, np.float32(1e-12))
    return unit

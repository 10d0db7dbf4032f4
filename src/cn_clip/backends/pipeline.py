"""Batches for a backend: decoding ahead, order, texts batched by length, unit length."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cn_clip.config import ModelConfig
from cn_clip.errors import ImageError
from cn_clip.image.decode import MAX_PIXELS, ImageInput, find_images, read_image, read_pixels
from cn_clip.translation import _

_LENGTH_STEP = 4  # tokens; a smaller difference is not worth a batch of its own
_MAX_COPIED_PIXELS = 1 << 22  # a larger PIL image is prepared at once instead of copied

PreparedImage = npt.NDArray[Any]  # (3, S, S): uint8, or float32 if it is normalised already


@dataclass(frozen=True, slots=True)
class ImagePreparation:
    """Image to pixels: decode, apply EXIF orientation, squash to the model's resolution."""

    config: ModelConfig
    fast_decode: bool = False
    max_pixels: int = MAX_PIXELS

    def __call__(self, source: ImageInput) -> PreparedImage:
        """Return uint8 pixels (3, S, S); of a float tensor, its values as float32.

        Raises:
            ImageError: the image is unreadable or refused.
        """
        if is_tensor(source):
            array = tensor_values(source)
            if array.dtype.kind == "f":
                return self._normalised(array)
            source = _channels_last(array)
        pixels = read_pixels(
            source,
            self.config.vision.resolution,
            max_pixels=self.max_pixels,
            fast_decode=self.fast_decode,
            background=self.config.background,
        )
        return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))

    def _normalised(self, array: npt.NDArray[Any]) -> PreparedImage:
        side = self.config.vision.resolution
        if array.shape != (3, side, side):
            raise ImageError(
                _(
                    "a float tensor of shape {shape} is not an output of preprocess, which has "
                    "the shape {expected}; give that, or a uint8 tensor of pixels",
                    shape=array.shape,
                    expected=(3, side, side),
                )
            )
        return np.ascontiguousarray(array, dtype=np.float32)


def is_tensor(value: object) -> bool:
    """Return whether a value is a ``torch.Tensor``; torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def tensor_values(tensor: Any) -> npt.NDArray[Any]:
    """Return the values of a ``torch.Tensor`` on any device; numpy has no bfloat16."""
    tensor = tensor.detach().cpu()
    values: npt.NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return values


def _channels_last(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return pixels (C, H, W), as torchvision reads them, as (H, W, C) or (H, W)."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
        return array[:, :, 0] if array.shape[2] == 1 else array
    return array


def iter_images(
    images: ImageInput | Iterable[ImageInput],
) -> tuple[Iterator[ImageInput], int | None]:
    """Return one image, or each of several, and their number if it is known.

    A 4-dimensional array or tensor is a batch of images, a folder all images in it, as
    ``find_images`` lists them.
    """
    several: Iterable[ImageInput]
    if isinstance(images, np.ndarray) or is_tensor(images):
        array: Any = images
        several = [array] if array.ndim < 4 else array
    elif isinstance(images, str | os.PathLike) and os.path.isdir(os.path.expanduser(images)):
        several = find_images([images])
    elif isinstance(images, str | os.PathLike | bytes | bytearray | Image.Image):
        several = [images]
    elif not isinstance(images, Iterable):
        raise ImageError(
            _("{images!r:.60} is neither an image nor a list of images", images=images)
        )
    else:
        several = images
    return iter(several), len(several) if isinstance(several, Sized) else None


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

    A batch has at most ``max_rows`` texts and ``max_tokens`` tokens, padding included. Its lengths
    round up to the same multiple of ``_LENGTH_STEP``, or differ by less than a quarter of it.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    while by_length:
        longest = lengths[by_length[0]]
        count = max(1, min(max_rows, max_tokens // longest))
        rounded = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
        too_short = rounded - max(_LENGTH_STEP, rounded // 4)
        batch = [i for i in by_length[:count] if lengths[i] > too_short]
        yield batch, longest
        by_length = by_length[len(batch) :]


def unit_length(features: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return features (N, D) divided by their norm, as float32; zeros stay zeros."""
    features = features.astype(np.float32, copy=False)
    norms = np.sqrt(np.square(features).sum(axis=-1, keepdims=True))
    unit: npt.NDArray[np.float32] = features / np.maximum(norms, np.float32(1e-12))
    return unit

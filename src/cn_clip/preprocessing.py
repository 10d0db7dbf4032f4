"""A model's preprocessing as two functions, for a ``DataLoader`` and a training loop of one's own.

Both can be pickled, so that worker processes can use them, whatever their start method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cn_clip.backends.pipeline import ImagePreparation
from cn_clip.image.decode import ImageInput
from cn_clip.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import LongTensor, Tensor


@dataclass(frozen=True, slots=True)
class Preprocess:
    """One image to the normalised pixels that the model takes, as ``Embedder`` computes them."""

    preparation: ImagePreparation

    def __call__(self, image: ImageInput) -> Tensor:
        """Return float32 pixels (3, S, S) of a path, bytes, a PIL image, an array or a tensor.

        Raises:
            ImageError: the image is unreadable or refused.
        """
        import torch

        pixels = torch.from_numpy(self.preparation(image))
        if pixels.dtype != torch.uint8:
            return pixels  # normalised already
        config = self.preparation.config
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std)
        )
        return (pixels.float() / 255 - mean) / std


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Texts to token ids of the model's context length."""

    tokenizer: Tokenizer
    context_length: int

    def __call__(self, texts: str | Sequence[str]) -> LongTensor:
        """Return token ids (N, ``context_length``), int64, padded with 0; longer texts are
        truncated and counted.

        Raises:
            UsageError: a text is not a string.
        """
        import torch

        ids = torch.from_numpy(self.tokenizer(texts, self.context_length))
        assert isinstance(ids, torch.LongTensor)
        return ids

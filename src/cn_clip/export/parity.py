"""An export compared with its original on real images and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cn_clip.embedder import Embedder
from cn_clip.image.decode import ImageInput
from cn_clip.topk import top_k

_K = 10
# Smallest cosine to the original of any image or text. That of int8 only finds what is broken, such
# as saturated sums (0.8 and less): one unusual image says little about int8, and recall decides.
REQUIRED_COSINE = {"float32": 0.99999, "float16": 0.9995, "bfloat16": 0.9995, "int8": 0.9}


@dataclass(frozen=True, slots=True)
class Parity:
    """Agreement of an export with its original.

    Attributes:
        images: number of images compared.
        texts: number of texts compared.
        image_cosine: smallest and mean cosine of the image embeddings.
        text_cosine: smallest and mean cosine of the text embeddings.
        top10_agreement: mean share of the 10 best images of a text that are the same.
    """

    images: int
    texts: int
    image_cosine: tuple[float, float]
    text_cosine: tuple[float, float]
    top10_agreement: float

    @property
    def smallest_cosine(self) -> float:
        """Smallest cosine of any image or text."""
        return min(self.image_cosine[0], self.text_cosine[0])


class Reference:
    """Embeddings of the original, computed once for all comparisons."""

    def __init__(
        self, original: Embedder, images: Sequence[ImageInput], texts: Sequence[str]
    ) -> None:
        self.inputs, self.texts = images, texts
        self.image_embeddings = original.embed_images(images)
        self.text_embeddings = original.embed_texts(texts)

    def compare(self, exported: Embedder) -> Parity:
        """Embed the same images and texts with an export, and compare."""
        images = exported.embed_images(self.inputs)
        texts = exported.embed_texts(self.texts)
        k = min(_K, len(images))
        before = top_k(self.text_embeddings, self.image_embeddings, k).indexes
        after = top_k(_finite(texts), _finite(images), k).indexes
        same = [len(np.intersect1d(a, b)) / k for a, b in zip(before, after, strict=True)]
        return Parity(
            images=len(images),
            texts=len(texts),
            image_cosine=_cosines(images, self.image_embeddings),
            text_cosine=_cosines(texts, self.text_embeddings),
            top10_agreement=float(np.mean(same)),
        )


def _cosines(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> tuple[float, float]:
    cosines = np.einsum("nd,nd->n", _finite(ours).astype(np.float64), theirs.astype(np.float64))
    return float(cosines.min()), float(cosines.mean())


def _finite(embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Replace NaN and infinity by zeros, whose cosine is 0."""
    return np.nan_to_num(embeddings, nan=0.0, posinf=0.0, neginf=0.0)

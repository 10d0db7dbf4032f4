"""Target embeddings of texts in the joint space: their meaning and their looks.

Embeddings of this sentence encoder have a large common component, which is subtracted, because it
makes all cosines high. The remainder is the meaning of a text. It does not contain the looks of an
image, so each target is moved towards the looks of the nearest known texts: 'a giraffe on the
savanna' towards the looks written for 'giraffe'.
"""

from collections.abc import Callable, Sequence

import numpy as np
from words import Thing, looks

LOOK_WEIGHT = 0.8  # weight of the neighbours' looks in a target
SHARPNESS = 20.0  # inverse temperature of the softmax over neighbours
_BLOCK = 2048


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Space:
    """Target embeddings of texts, float32 (N, D), unit length.

    ``prototypes`` (1000, D) are those of the ImageNet classes: the mean of their names' meanings.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], np.ndarray],
        classes: Sequence[Thing],
        things: Sequence[Thing],
    ) -> None:
        """Take a sentence encoder, texts to (N, D), and things with known looks."""
        self._encode = encode
        names = encode([name for thing in classes for name in thing.words.names])
        counts = [len(thing.words.names) for thing in classes]
        means = np.add.reduceat(names, np.cumsum([0, *counts[:-1]])) / np.array(counts)[:, None]
        self._common = means.mean(0)
        self.prototypes = unit(means - self._common).astype(np.float32)
        texts, weights = looks([*classes, *things])
        self._known = self.meaning_embeddings(texts)
        self._looks = unit(weights @ self.prototypes).astype(np.float32)

    def meaning_embeddings(self, texts: Sequence[str]) -> np.ndarray:
        """Return embeddings (N, D) of the sentence encoder without the common component."""
        return unit(self._encode(texts) - self._common).astype(np.float32)

    def targets(self, texts: Sequence[str]) -> np.ndarray:
        """Return target embeddings (N, D) of texts, from their meaning and looks."""
        meanings, chunks = self.meaning_embeddings(texts), []
        for start in range(0, len(meanings), _BLOCK):
            chunk = meanings[start : start + _BLOCK]
            similarities = chunk @ self._known.T * SHARPNESS
            weights = np.exp(similarities - similarities.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            chunks.append(unit(chunk + LOOK_WEIGHT * weights @ self._looks))
        return np.concatenate(chunks).astype(np.float32)

"""Where each text belongs in the joint space: what it means, and how what it names looks.

Sentence encoders of this family have a large vector common to all texts, and one common to each
language; it goes, or every text would be near every other. What is left says what a text means. It
does not say how its picture looks, so each text is drawn towards the looks of the known texts near
it: 'a giraffe on the savanna' towards what is written down for 'giraffe'.
"""

from collections.abc import Callable, Sequence

import numpy as np
from words import Thing, looks

PULL = 0.8  # how far a text moves towards the looks of its neighbours
SHARPNESS = 20.0  # of the softmax over neighbours, by cosine
_BLOCK = 2048


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Space:
    """Places of texts, float32 unit vectors (N, D).

    ``prototypes`` (1000, D) are the classes of ImageNet: the mean of what their names mean.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], np.ndarray],
        classes: Sequence[Thing],
        things: Sequence[Thing],
    ) -> None:
        """Take a sentence encoder, texts to (N, D), and what is known of looks."""
        self._encode = encode
        names = encode([name for each in classes for name in each.words.names])
        counts = [len(each.words.names) for each in classes]
        means = np.add.reduceat(names, np.cumsum([0, *counts[:-1]])) / np.array(counts)[:, None]
        self._common = means.mean(0)
        self.prototypes = unit(means - self._common).astype(np.float32)
        texts, shares = looks([*classes, *things])
        self._known = self.meanings(texts)
        self._looks = unit(shares @ self.prototypes).astype(np.float32)

    def meanings(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D): what the sentence encoder says, without what is common to all texts."""
        return unit(self._encode(texts) - self._common).astype(np.float32)

    def places(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D): where texts belong, by what they mean and how what they name looks."""
        own, found = self.meanings(texts), []
        for start in range(0, len(own), _BLOCK):
            some = own[start : start + _BLOCK]
            near = some @ self._known.T * SHARPNESS
            shares = np.exp(near - near.max(1, keepdims=True))
            shares /= shares.sum(1, keepdims=True)
            found.append(unit(some + PULL * shares @ self._looks))
        return np.concatenate(found).astype(np.float32)

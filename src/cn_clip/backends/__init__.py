"""The backend protocol: a runtime implements one method for each tower."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[Any]  # uint8 or float32 (B, 3, S, S)
Features = npt.NDArray[np.float32]  # (B, D)


class ParameterCount(NamedTuple):
    """Number of parameters of the image tower and of the whole model."""

    image: int
    total: int


class Backend(Protocol):
    """Runs the two towers of one model; preparation, batching and normalisation happen outside."""

    @property
    def dim(self) -> int:
        """Length D of a feature vector."""

    @property
    def logit_scale(self) -> float:
        """The factor on cosines before a softmax."""

    @property
    def precision(self) -> str:
        """Precision of the towers, such as ``"float32"``."""

    @property
    def parameter_count(self) -> ParameterCount:
        """Number of parameters."""

    def run_images(self, pixels: Pixels) -> Features:
        """Return features (B, D) of images (B, 3, S, S).

        uint8 pixels are normalised by the backend; float32 pixels are already normalised.
        """

    def run_texts(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_]) -> Features:
        """Return features (B, D) of token ids (B, L); ``mask`` (B, L) is False for padding."""

"""A backend for exported graphs, whatever runtime executes them.

Batches run in few different shapes, because runtimes keep memory and plans for every shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cn_clip.backends import Features, ParameterCount, Pixels
from cn_clip.backends.exported import Exported

RunGraph = Callable[[npt.NDArray[Any]], Features]
"""Runs one graph on a batch (B, ...) and returns features (B, D)."""

_SHORT = 16  # tokens; most captions are shorter


class GraphBackend:
    """Runs the two graphs of an export; see ``Backend``."""

    def __init__(
        self,
        exported: Exported,
        run_image: RunGraph,
        run_text: RunGraph,
        *,
        precision: str,
        runtime: str,
    ) -> None:
        """Create a backend from two functions.

        Args:
            exported: describes the graphs.
            run_image: runs the image graph on float32 (B, 3, S, S).
            run_text: runs the text graph on int64 (B, L).
            precision: that the runtime computes in.
            runtime: name, version and device of the runtime.
        """
        self.runtime = runtime
        self._exported, self._precision = exported, precision
        self._run_image, self._run_text = run_image, run_text
        mean = np.array(exported.model.image_mean, np.float32)[:, None]
        std = np.array(exported.model.image_std, np.float32)[:, None]
        levels = np.arange(256, dtype=np.float32) / np.float32(255)
        self._normalised = (levels - mean) / std  # (3, 256): every value a channel can have

    @property
    def dim(self) -> int:
        return self._exported.model.embed_dim

    @property
    def logit_scale(self) -> float:
        return self._exported.logit_scale

    @property
    def precision(self) -> str:
        return self._precision

    @property
    def parameter_count(self) -> ParameterCount:
        return self._exported.parameters

    def run_images(self, pixels: Pixels) -> Features:
        return self._in_buckets(self._run_image, self._normalise(pixels))

    def run_texts(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_]) -> Features:
        # ``mask`` is not needed: the graph masks padding by its id, 0.
        length = ids.shape[1]
        padded = max(length, min(padded_length(length), self._exported.model.context_length))
        return self._in_buckets(self._run_text, np.pad(ids, ((0, 0), (0, padded - length))))

    def _normalise(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        if pixels.dtype != np.uint8:
            return pixels.astype(np.float32, copy=False)
        normalised = np.empty(pixels.shape, np.float32)
        for channel, levels in enumerate(self._normalised):
            np.take(levels, pixels[:, channel], out=normalised[:, channel], mode="clip")
        return normalised

    def _in_buckets(self, run: RunGraph, batch: npt.NDArray[Any]) -> Features:
        parts = [np.empty((0, self.dim), np.float32)]
        for start, stop, size in batch_buckets(len(batch)):
            rows = batch[start:stop]
            # Copies of the last row, since a text of padding alone has no features.
            padded = np.pad(rows, ((0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)), "edge")
            parts.append(run(padded)[: len(rows)])
        return np.concatenate(parts)


def padded_length(length: int) -> int:
    """Return the length that texts of a length are padded to: a multiple of 8, or of 4 if short."""
    step = 4 if length <= _SHORT else 8
    return -(-length // step) * step


def batch_buckets(count: int) -> list[tuple[int, int, int]]:
    """Split ``count`` rows into batches of 2^n or 3 * 2^n rows.

    Returns (start, stop, size) of each: its rows, and its size with padding. Of more than eight
    rows at most an eighth is padding.
    """
    buckets, start = [], 0
    while start < count:
        left = count - start
        below = 1 << (left.bit_length() - 1)  # the last power of two
        sizes = (below, below + below // 2, 2 * below)
        size = next(size for size in sizes if size >= left)
        if size > 8 and size - left > size // 8:
            size = max(size for size in sizes if size <= left)
        buckets.append((start, min(count, start + size), size))
        start += size
    return buckets

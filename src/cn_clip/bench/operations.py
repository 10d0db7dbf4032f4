"""Number of arithmetic operations of the two towers."""

from __future__ import annotations

from cn_clip.config import ModelConfig


def image_operations(config: ModelConfig) -> float | None:
    """Return additions and multiplications for one image; None for a convolutional tower.

    Convolutions are not matrix products of one size, so the floor says little about them.
    """
    vision = config.vision
    if vision.kind != "vit":
        return None
    width, tokens = vision.width, (vision.resolution // vision.patch_size) ** 2 + 1
    patches = 2 * (tokens - 1) * 3 * vision.patch_size**2 * width
    return (
        patches + _blocks(tokens, width, 4 * width, vision.layers[0]) + 2 * width * config.embed_dim
    )


def text_operations(config: ModelConfig, tokens: float) -> float:
    """Return additions and multiplications for one text of ``tokens`` tokens."""
    text = config.text
    blocks = _blocks(tokens, text.hidden_size, text.intermediate_size, text.layers)
    return blocks + 2 * text.hidden_size * config.embed_dim


def _blocks(tokens: float, width: int, inner: int, layers: int) -> float:
    """Projections (4 W^2 per token), MLP (2 W I) and attention (2 N W), times two."""
    return 2.0 * layers * tokens * (4 * width**2 + 2 * width * inner + 2 * tokens * width)
